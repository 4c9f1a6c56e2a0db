"""llmd_predicted: the least predicted time to the first token and per token, where the prompt is cached if bearable."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import ClassVar

import numpy as np
from safetensors.numpy import load

from swarmx.agents.policies.trees import TreeEnsemble, trees_from
from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Order

WEIGHTS = "llmd_predicted.safetensors"
FEATURES = (
    "waiting",
    "running",
    "kv_usage",
    "input_tokens",
    "prefix_score",
    "uncached_tokens",
    "prefill_tokens_in_flight",
    "decode_tokens_in_flight",
    "max_batch",
    "call_base_steps",
    "prefill_steps",
    "prefill_ahead_steps",
    "batch_steps",
    "context_steps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmdPredicted:
    """The least predicted TTFT and TPOT, among the replicas that cache the prompt while that is bearable.

    Predicted-latency scheduling of llm-d. Two gradient-boosted regressors give TTFT and TPOT of the call on each
    candidate. If the cache of some holds `affinity` of the prompt, the others are left out, but for a share `explore`
    of the calls, and unless the best TTFT among the rest is better by more than `penalty_s`. No call brings targets
    for TTFT and TPOT, so no candidate meets them: as in llm-d, idle candidates then go first (`idle_first`), and the
    least blend of both wins, by `ttft_weight` and `tpot_weight`, each scaled to [0, 1] over the candidates; with
    `weighted` 1, better scores are only likelier (its weighted random picker). `e2e` 1 takes the least TTFT + TPOT x
    forecast work instead: llm-d trains on whole latencies then, from features that know no output length. `mean` 1
    predicts means (geometric) instead of P90.

    The regressors learn online there, for one kind of device. Here they were trained once (`eval.fit.llmd`), on engines
    of many devices, and get what the original has no use for: each device's constants. Times and features count in
    steps of the device (a decode of one sequence), which any device of the same proportions shares. Counts are the
    router's own, always fresh, where the original reads the engines' metrics.
    """

    name: ClassVar[str] = "llmd_predicted"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    affinity: float = 0.8
    explore: float = 0.01
    penalty_s: float = 5.0
    ttft_weight: float = 0.8
    tpot_weight: float = 0.2
    idle_first: float = 1.0
    weighted: float = 0.0
    e2e: float = 0.0
    mean: float = 0.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        ttft_s, tpot_s = predict(call, fleet, "mean" if self.mean > 0.0 else "p90")
        work_s = tpot_s * call.forecast.mean
        kept = self._kept(call, fleet, ttft_s, rng)
        idle = kept & (fleet.in_flight == 0)
        if self.idle_first > 0.0 and idle.any():
            kept = idle
        rows = kept.nonzero()[0]
        if self.e2e > 0.0:
            score = 1.0 - _scaled((ttft_s + work_s)[rows])
        else:
            score = 1.0 - self._blend(ttft_s[rows], tpot_s[rows])
        if self.weighted > 0.0:  # A-Res (Efraimidis & Spirakis 2006) for a sample of one
            best = np.array([(np.log1p(-rng.random(len(rows))) / np.maximum(score, 1e-9)).argmax()])
        else:
            best = (score >= score.max() - 1e-9).nonzero()[0]
        index = int(rows[best[rng.integers(len(best))]])
        return Choice(index=index, cost_s=ttft_s + work_s, terms_s={"ttft_s": ttft_s, "decode_s": work_s})

    def _kept(
        self, call: CallView, fleet: FleetView, ttft_s: Floats, rng: np.random.Generator
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """The prefix-affinity filter."""
        every = np.ones(len(fleet), dtype=np.bool_)
        sticky: np.ndarray[tuple[int], np.dtype[np.bool_]] = fleet.cached_tokens >= self.affinity * max(
            1, call.call.prompt_tokens
        )
        if self.affinity <= 0.0 or not sticky.any() or sticky.all() or rng.random() < self.explore:
            return every
        late = self.penalty_s > 0.0 and ttft_s[sticky].min() - ttft_s[~sticky].min() > self.penalty_s
        return every if late else sticky

    def _blend(self, ttft_s: Floats, tpot_s: Floats) -> Floats:
        """Both scaled and weighted; what does not differ at all has no weight."""
        ttft, tpot = _scaled(ttft_s), _scaled(tpot_s)
        a, b = self.ttft_weight * bool(ttft.any()), self.tpot_weight * bool(tpot.any())
        blend: Floats = (a * ttft + b * tpot) / max(a + b, 1e-9)
        return blend


def predict(call: CallView, fleet: FleetView, objective: str) -> tuple[Floats, Floats]:
    """TTFT, and seconds a token (or unit of work), of the call on each replica; both of shape [replicas]."""
    ttft, tpot = _regressors(objective)
    rows, step_s = features(call.call.prompt_tokens, fleet), steps_s(fleet)
    return step_s * np.exp(ttft.predict(rows)), step_s * np.exp(tpot.predict(rows))


def steps_s(fleet: FleetView) -> Floats:
    """Seconds of a decode step of one sequence, above zero."""
    step_s: Floats = np.maximum(fleet.step_base_s + fleet.decode_seq_s, 1e-6)
    return step_s


def features(prompt_tokens: int, fleet: FleetView) -> Floats:
    """What the regressors look at, in the order of FEATURES; shape [replicas, features]."""
    step_s, running = steps_s(fleet), np.minimum(fleet.in_flight, fleet.max_batch)
    cached = np.minimum(fleet.cached_tokens, max(0, prompt_tokens - 1))
    uncached = prompt_tokens - cached
    uncached_s = fleet.prefill_token_s * uncached + fleet.prefill_ctx_token_s * uncached * (cached + uncached / 2.0)
    rows = np.empty((len(FEATURES), len(fleet)), dtype=np.float32)
    rows[:] = (
        fleet.in_flight - running,
        running,
        np.minimum(1.0, fleet.context_tokens / np.maximum(fleet.kv_capacity_tokens, 1.0)),
        np.broadcast_to(float(prompt_tokens), len(fleet)),
        cached / max(1, prompt_tokens),
        uncached,
        fleet.prefill_tokens,
        fleet.context_tokens,
        fleet.max_batch,
        fleet.call_base_s / step_s,
        uncached_s / step_s,
        fleet.prefill_token_s * fleet.prefill_tokens / step_s,
        (fleet.step_base_s + fleet.decode_seq_s * (running + 1)) / step_s,
        fleet.decode_ctx_token_s * fleet.context_tokens / step_s,
    )
    return rows.T.astype(np.float64)


@cache
def _regressors(objective: str) -> tuple[TreeEnsemble, TreeEnsemble]:
    arrays = load(files("swarmx.agents.policies").joinpath(WEIGHTS).read_bytes())
    return (
        trees_from(arrays, f"ttft_{objective}", len(FEATURES)),
        trees_from(arrays, f"tpot_{objective}", len(FEATURES)),
    )


def _scaled(values: Floats) -> Floats:
    """To [0, 1], the least to zero; all zero where they do not differ."""
    least = values.min()
    spread = values.max() - least
    scaled: Floats = (values - least) / spread if spread > 0.0 else np.zeros_like(values)
    return scaled

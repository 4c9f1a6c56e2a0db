"""Train the latency regressors of the policy `llmd_predicted` on engines under random load.

    python -m eval.fit.llmd --out swarmx/agents/policies/llmd_predicted.safetensors [--episodes N] [--trees N]

llm-d trains a TTFT and a TPOT regressor from requests that were served. Here these come from `core.batching.Engine`:
an episode is one engine (a fitted profile of `core/data/engine_profiles.json`, or an invented slot server, with a batch
limit drawn) under Poisson arrivals at 0.1 to 1.4 of a rough capacity; the median prompt and answer of the episode are
log-uniform over (100, 12000) and (30, 800) tokens, single calls lognormal (deviation 0.8); a part of the calls
continues a session, so that its prompt is cached. In most episodes calls wait outside until the batch has room, as they
do with late binding. A row is what a router knows when it sends the call (`policies.llmd_predicted.features`) with the
true TTFT and TPOT, in steps of the device; regressors fit the logarithm. `fit` takes such rows from elsewhere, too.

Hyper-parameters are llm-d's (LightGBM: depth 6, 20 rows a leaf, 0.8 of rows and columns, P90 or mean), but for half as
many trees at twice the rate: see the report that is printed, over episodes held out whole.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightgbm
import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from swarmx.agents.policies.llmd_predicted import FEATURES, features, steps_s
from swarmx.agents.policies.trees import DEPTH, LEAVES, NODES, trees_from
from swarmx.core.batching import BLOCK_TOKENS, Engine, Request
from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.fleet import FleetView

Floats = NDArray[np.float64]
MODELS = ("llama-3.1-8b", "llama-3.1-70b-fp8", "llama-3.1-70b", "qwen3-8b", "qwen3-32b", "sdxl", "flux-dev")
SLOTS = tuple(
    EngineProfile(model="slots", device=str(n), step_base_s=0.01, call_base_s=0.05, max_batch=n) for n in (1, 4, 16)
)
CALLS = 160
TOLD_EVERY = 128  # tokens of an answer, between two words about its progress
_COLUMNS = ("call_base_s", "step_base_s", "decode_seq_s", "decode_ctx_token_s", "prefill_token_s",
            "prefill_ctx_token_s", "kv_capacity_tokens", "max_step_tokens", "cost_weight")  # fmt: skip
_NONE = np.zeros(1)
_ONE = np.ones(1)


@dataclass(slots=True, kw_only=True)
class Rows:
    """`x` has shape [rows, features]; `ttft` and `tpot`, shape [rows], are in steps of the device; `episode` groups."""

    x: Floats
    ttft: Floats
    tpot: Floats
    episode: NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class _Sent:
    row: Floats
    step_s: float
    at_s: float
    prompt: int
    output: int
    first_s: float = math.nan
    end_s: float = math.nan


@dataclass(slots=True, kw_only=True)
class _Episode:
    """One engine with what its router knows of it."""

    profile: EngineProfile
    rng: np.random.Generator
    engine: Engine = field(init=False)
    sent: dict[str, _Sent] = field(default_factory=dict)
    here: dict[str, _Sent] = field(default_factory=dict)
    backlog: float = 0.0
    backlog_at_s: float = 0.0

    def __post_init__(self) -> None:
        self.engine = Engine(self.profile)

    def advance(self, now_s: float) -> None:
        for event in self.engine.advance(now_s):
            if event.kind == "first_token":
                self.sent[event.request_id].first_s = event.at_s
            elif event.kind == "finished":
                self.here.pop(event.request_id).end_s = event.at_s

    def told(self, name: str) -> int:
        """Output tokens that a router has heard of; a serial server tells of none before the end."""
        return 0 if self.profile.prefill_token_s == 0.0 else self.engine.produced(name) // TOLD_EVERY * TOLD_EVERY

    def view(self, now_s: float, cached: float) -> FleetView:
        profile = self.profile
        drained = (now_s - self.backlog_at_s) / profile.prefill_token_s if profile.prefill_token_s else math.inf
        context = sum(sent.prompt + self.told(name) for name, sent in self.here.items())
        return FleetView(
            in_flight=np.array([len(self.here)]), last_chosen=np.zeros(1, dtype=np.int64),
            max_batch=np.array([profile.max_batch]), remaining_work=_NONE, work_variance=_NONE,
            context_tokens=np.array([float(context)]), cached_tokens=np.array([cached]),
            prefill_tokens=np.array([max(0.0, self.backlog - drained) if self.here else 0.0]),
            running=_NONE, waiting=_NONE, kv_usage=_NONE, signal_age_s=_NONE, prefill_share=_NONE, slowdown=_ONE,
            unread_tokens=_NONE, shared_tokens=_NONE, weight=_ONE,
            **{name: np.array([float(getattr(profile, name))]) for name in _COLUMNS},
        )  # fmt: skip

    def send(self, name: str, prompt: int, output: int, prefix: tuple[int, ...], cached: int, now_s: float) -> None:
        view = self.view(now_s, float(cached))
        request = Request(request_id=name, prompt_tokens=prompt, output_tokens=output, prefix=prefix)
        if not self.engine.submit(request, now_s):
            return
        sent = _Sent(
            row=features(prompt, view)[0], step_s=float(steps_s(view)[0]), at_s=now_s, prompt=prompt, output=output
        )
        self.sent[name] = self.here[name] = sent
        self.backlog, self.backlog_at_s = float(view.prefill_tokens[0]) + prompt - cached, now_s


def episode(profile: EngineProfile, rng: np.random.Generator) -> list[_Sent]:
    """Serve `CALLS` calls at one level of load; those that ended."""
    serial_work = profile.prefill_token_s == 0.0
    prompt_median = 0.0 if serial_work else math.exp(rng.uniform(math.log(100), math.log(12_000)))
    output_median = math.exp(rng.uniform(math.log(15), math.log(150) if serial_work else math.log(800)))
    batch = min(profile.max_batch, max(1, int(profile.kv_capacity_tokens / (prompt_median + output_median + 1))), 64)
    step_s = profile.step_s(batch, batch * (prompt_median + output_median / 2)) / batch
    each_s = output_median * 1.4 * step_s + profile.prefill_token_s * prompt_median * 1.4 + profile.call_base_s / batch
    gap_s = each_s / rng.uniform(0.1, 1.4)
    late = rng.random() < 0.7
    again = rng.choice([0.0, 0.5, 0.9])
    world = _Episode(profile=profile, rng=rng)
    sessions: list[tuple[int, int]] = []  # tag, tokens so far
    now_s, outside = 0.0, 0
    limit = profile.kv_capacity_tokens // 2
    for i in range(CALLS):
        now_s += rng.exponential(gap_s)
        world.advance(now_s)
        outside += 1
        while outside and not (late and len(world.here) >= profile.max_batch):
            outside -= 1
            _next_call(world, f"{i}.{outside}", prompt_median, output_median, again, sessions, limit, now_s)
    world.advance(math.inf)
    return [sent for sent in world.sent.values() if math.isfinite(sent.end_s)]


def _next_call(
    world: _Episode, name: str, prompt_median: float, output_median: float, again: float,
    sessions: list[tuple[int, int]], limit: int, now_s: float,
) -> None:  # fmt: skip
    rng = world.rng
    output = max(1, int(output_median * rng.lognormal(0.0, 0.8)))
    if prompt_median == 0.0:
        world.send(name, 0, output, (), 0, now_s)
        return
    fresh = max(1, int(prompt_median * rng.lognormal(0.0, 0.8)))
    tag, before = len(world.sent) + 1, 0
    if sessions and rng.random() < again:
        tag, before = sessions.pop(int(rng.integers(len(sessions))))
        fresh = max(1, fresh // 8)
    prompt = max(1, min(before + fresh, limit - output))
    cached = min(before, prompt) // BLOCK_TOKENS * BLOCK_TOKENS
    prefix = tuple(tag * 1_000_000 + block for block in range(prompt // BLOCK_TOKENS))
    if prompt + output < limit:
        sessions.append((tag, prompt))
    if prompt > 0 and output < limit:
        world.send(name, prompt, output, prefix, cached, now_s)


def invented_rows(episodes: int, seed: int) -> Rows:
    """Rows of so many episodes on every profile."""
    rng = np.random.default_rng(seed)
    known = [profile for (model, _), profile in profiles().items() if model in MODELS]
    x, ttft, tpot, group = [], [], [], []
    for number in range(episodes):
        for profile in (*known, *SLOTS):
            limit = profile.max_batch if profile.max_batch <= 16 else int(rng.choice([profile.max_batch, 64, 32, 16]))
            for sent in episode(msgspec.structs.replace(profile, max_batch=limit), rng):
                x.append(sent.row)
                ttft.append((sent.first_s - sent.at_s) / sent.step_s)
                tpot.append((sent.end_s - sent.first_s) / max(1, sent.output - 1) / sent.step_s)
                group.append(number)
    return Rows(x=np.array(x), ttft=np.array(ttft), tpot=np.array(tpot), episode=np.array(group))


def fit(rows: Rows, *, trees: int, rate: float) -> dict[str, NDArray[Any]]:
    """Four regressors as arrays, by `ttft_` or `tpot_` and `p90` or `mean`."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, target in (("ttft", rows.ttft), ("tpot", rows.tpot)):
        for kind, objective in (("p90", {"objective": "quantile", "alpha": 0.9}), ("mean", {"objective": "l2"})):
            good = target > 0.0
            data = lightgbm.Dataset(rows.x[good], np.log(target[good]))
            settings = {
                **objective, "learning_rate": rate, "max_depth": DEPTH, "num_leaves": LEAVES, "min_data_in_leaf": 20,
                "bagging_fraction": 0.8, "bagging_freq": 1, "feature_fraction": 0.8, "num_threads": 1, "seed": 0,
                "deterministic": True, "verbose": -1,
            }  # fmt: skip
            booster = lightgbm.train(settings, data, num_boost_round=trees)
            arrays |= {f"{name}_{kind}_{key}": value for key, value in complete(booster).items()}
    return arrays


def complete(booster: lightgbm.Booster) -> dict[str, NDArray[Any]]:
    """The trees of a booster in the layout of `policies.trees`."""
    roots = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]]
    feature = np.zeros((len(roots), NODES), dtype=np.uint8)
    threshold = np.full((len(roots), NODES), np.inf, dtype=np.float32)
    leaf = np.zeros((len(roots), LEAVES), dtype=np.float32)
    for tree, root in enumerate(roots):
        _lay_out(root, 0, feature[tree], threshold[tree], leaf[tree])
    return {"feature": feature, "threshold": threshold, "leaf": leaf}


def _lay_out(
    node: Mapping[str, Any], at: int, feature: NDArray[np.uint8], threshold: NDArray[np.float32],
    leaf: NDArray[np.float32],
) -> None:  # fmt: skip
    if "leaf_value" in node:
        while at < NODES:  # a node without a threshold sends every row to the left
            at = 2 * at + 1
        leaf[at - NODES] = node["leaf_value"]
        return
    exact = float(node["threshold"])
    rounded = np.float32(exact)
    # rows are float32, too: rounded down, the threshold divides them as the exact one does
    threshold[at] = np.nextafter(rounded, np.float32(-np.inf)) if rounded > exact else rounded
    feature[at] = node["split_feature"]
    _lay_out(node["left_child"], 2 * at + 1, feature, threshold, leaf)
    _lay_out(node["right_child"], 2 * at + 2, feature, threshold, leaf)


def report(arrays: Mapping[str, NDArray[Any]], rows: Rows) -> dict[str, float]:
    """On rows that were not trained on: coverage and pinball loss of P90, median relative error of the mean."""
    found = {}
    for name, target in (("ttft", rows.ttft), ("tpot", rows.tpot)):
        good = target > 0.0
        truth = target[good]
        p90, mean = (
            np.exp(trees_from(arrays, f"{name}_{kind}", len(FEATURES)).predict(rows.x[good]))
            for kind in ("p90", "mean")
        )
        error = np.log(truth / p90)
        found[f"{name}_p90_coverage"] = float((error <= 0.0).mean())
        found[f"{name}_p90_pinball_log"] = float(np.maximum(0.9 * error, -0.1 * error).mean())
        found[f"{name}_median_relative_error"] = float(np.median(np.abs(mean / truth - 1.0)))
        found[f"{name}_log_mae"] = float(np.abs(np.log(mean / truth)).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = invented_rows(args.episodes, args.seed)
    held = rows.episode % 5 == 4
    train, test = (
        Rows(x=rows.x[at], ttft=rows.ttft[at], tpot=rows.tpot[at], episode=rows.episode[at]) for at in (~held, held)
    )
    arrays = fit(train, trees=args.trees, rate=args.rate)
    scores = report(arrays, test)
    notes = {"rows": str(len(train.x)), "features": " ".join(FEATURES)} | {k: f"{v:.4f}" for k, v in scores.items()}
    raw = save(arrays, metadata=notes)
    args.out.write_bytes(raw)
    print(f"{len(train.x)} rows, {len(test.x)} held out, {len(raw)} bytes")
    for name, value in scores.items():
        print(f"{name:32} {value:.4f}")


if __name__ == "__main__":
    main()

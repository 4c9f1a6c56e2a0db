"""The simulator against a real vLLM: fitted on a quiet server and on a busy one, judged on prompts of neither.

Where front, scheduler, model and the measuring client share few processors, what a call costs is more on a busy server
than alone. So the constants are fitted twice: request by request on the quiet server, and then on a load of its own,
each constant by a factor, until the engine model takes as long as the server did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import minimize

from eval.emulator import Seen, fit, play, poisson, predict, words
from eval.result import Row
from eval.sim.queueing import fleet_of, single_calls
from eval.sim.settings import SimSettings
from eval.sim.simulate import simulate
from eval.sim.vllm_sessions import Sessions, session_rows
from swarmx.core.batching import Request
from swarmx.core.engine import EngineProfile
from swarmx.core.fleet import Floats

LOADS = (0.3, 0.6)
FIT_LOAD = 0.45
_TIMES = ("step_base_s", "decode_seq_s", "prefill_token_s", "call_base_s")
"""The constants that a busy server is asked about; those of the context hardly show in prompts of this length."""

_CONSTANTS = (*_TIMES, "decode_ctx_token_s", "prefill_ctx_token_s")

_TRUST = 0.5
"""A factor that is e^this times off the quiet fit costs as much as one request that is so far off."""

_LEAST_S = {"step_base_s": 1e-4, "decode_seq_s": 1e-5, "prefill_token_s": 1e-6, "call_base_s": 1e-4}
"""What a constant starts from that the quiet fit found to be nothing: no factor makes something of zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Log-uniform sizes of requests, from and to: words of a prompt (about a token each) and tokens of an answer."""

    prompt_words: tuple[int, int] = (20, 600)
    output_tokens: tuple[int, int] = (8, 64)

    def typical(self) -> tuple[float, float]:
        """Means of the two."""
        (a, b), (c, d) = self.prompt_words, self.output_tokens
        return (b - a) / math.log(b / a), (d - c) / math.log(d / c)


async def vllm_rows(
    url: str,
    model: str,
    limits: EngineProfile,
    *,
    requests: int,
    seed: int,
    traffic: Traffic,
    loads: Sequence[float] = LOADS,
    shipped: EngineProfile | None = None,
    sessions: Sessions | None = None,
) -> list[Row]:
    """A row a load, and first one a profile; `limits` has --max-num-seqs, --max-num-batched-tokens and KV tokens.

    `shipped` is a profile that never saw this server, to be judged beside the two fits. With `sessions`, a row a
    profile of these follows.
    """
    rng = np.random.default_rng([seed, 0x711])
    largest = traffic.prompt_words[1]
    quiet = msgspec.structs.replace(await fit(url, model, limits, rng, largest), model="m")
    busy = fit_busy(quiet, await _load(url, model, quiet, FIT_LOAD, requests, rng, traffic))
    fitted = {"busy": busy, "quiet": quiet}
    if shipped is not None:
        fitted["shipped"] = msgspec.structs.replace(
            shipped, model="m", max_batch=limits.max_batch, max_step_tokens=limits.max_step_tokens
        )
    rows: list[Row] = [
        {"part": "vllm profile", "fit": name, **{each: getattr(profile, each) for each in _CONSTANTS}}
        for name, profile in fitted.items()
    ]
    for load in loads:
        real = await _load(url, model, quiet, load, requests, rng, traffic)
        rows.append(compared(real, fitted, load, seed))
    if sessions is not None:
        rows += await session_rows(url, model, fitted, sessions, seed)
    return rows


def compared(real: Sequence[Seen], profiles: Mapping[str, EngineProfile], load: float, seed: int) -> Row:
    """The row of one load, in order of submission: `ratio_`s are those of the profile "busy", `NAME_ratio_`s of any
    other."""
    plan = single_calls(
        [each.sent_s - real[0].sent_s for each in real],
        [each.prompt_tokens for each in real],
        [float(each.output_tokens) for each in real],
        "llm",
    )
    took_s = np.array([each.e2e_s for each in real])
    row: dict[str, Any] = {"part": "vllm", "load": load, "requests": len(real)}
    for name, level in (("p50", 0.5), ("p95", 0.95)):
        row[f"real_{name}_s"] = float(np.quantile(took_s, level))
    for fitted, profile in profiles.items():
        prefix = "" if fitted == "busy" else f"{fitted}_"
        ours_s = simulate(plan, fleet_of(profile, 1), SimSettings(forecast="oracle"), seed).latency()
        row[f"{prefix}median_error"] = float(np.median(np.abs(ours_s / took_s - 1.0)))
        for name, level in (("p50", 0.5), ("p95", 0.95)):
            row[f"{prefix}simulated_{name}_s"] = float(np.quantile(ours_s, level))
            row[f"{prefix}ratio_{name}"] = row[f"{prefix}simulated_{name}_s"] / row[f"real_{name}_s"]
    return row


def fit_busy(quiet: EngineProfile, seen: Sequence[Seen]) -> EngineProfile:
    """The profile with which the engine model takes as long as the server took for these requests, which overlapped.

    Least squares on the logarithms of times to the first token and to the end, in pure virtual time, over a factor for
    each constant of `_TIMES`; a factor far from 1 has to earn it.
    """
    seen = sorted(seen, key=lambda each: each.sent_s)
    requests = [
        Request(request_id=str(i), prompt_tokens=each.prompt_tokens, output_tokens=each.output_tokens)
        for i, each in enumerate(seen)
    ]
    sent_s = [each.sent_s for each in seen]
    took = np.log([(each.ttft_s, each.e2e_s) for each in seen])
    start = {name: max(_LEAST_S[name], getattr(quiet, name)) for name in _TIMES}

    def profile(logs: Floats) -> EngineProfile:
        factors = np.exp(logs).tolist()
        return msgspec.structs.replace(quiet, **{n: start[n] * f for n, f in zip(_TIMES, factors, strict=True)})

    def loss(logs: Floats) -> float:
        off = np.log(predict(profile(logs), requests, sent_s)) - took
        return float((off**2).sum() + ((logs / _TRUST) ** 2).sum())

    # An engine that moves from iteration to iteration has steps in this loss: nothing that needs slopes will do.
    found = minimize(loss, np.zeros(len(_TIMES)), method="Powell", bounds=[(-2.0, 2.0)] * len(_TIMES))
    return profile(found.x)


async def _load(
    url: str,
    model: str,
    profile: EngineProfile,
    load: float,
    requests: int,
    rng: np.random.Generator,
    traffic: Traffic,
) -> list[Seen]:
    """Poisson arrivals at this share of what full batches get done, each prompt in a step of its own; in order of
    submission."""
    prompt_tokens, output_tokens = traffic.typical()
    step_s = profile.step_s(profile.max_batch, profile.max_batch * int(prompt_tokens + output_tokens / 2.0))
    call_s = profile.alone_s(int(prompt_tokens), 1) + output_tokens * step_s / profile.max_batch
    low, high = traffic.prompt_words

    def prompt() -> str:
        return words(rng, int(np.exp(rng.uniform(math.log(low), math.log(high)))))

    seen = await play(url, model, poisson(load / call_s, requests, rng, prompt, traffic.output_tokens))
    return sorted(seen, key=lambda each: each.sent_s)

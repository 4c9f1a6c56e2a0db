"""The simulator against a real vLLM: fitted on a quiet server, compared under load on prompts of no fit."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from eval.emulator import fit, play, poisson, words
from eval.result import Row
from eval.sim.queueing import fleet_of, single_calls
from eval.sim.settings import SimSettings
from eval.sim.simulate import simulate
from swarmx.core.engine import EngineProfile

LOADS = (0.3, 0.6)
_OUTPUTS = (8, 64)


async def vllm_rows(url: str, model: str, limits: EngineProfile, *, requests: int, seed: int) -> list[Row]:
    """A row a load; `limits` has the server's --max-num-seqs, --max-num-batched-tokens and KV tokens."""
    rng = np.random.default_rng([seed, 0x711])
    profile = msgspec.structs.replace(await fit(url, model, limits, rng), model="m")
    rows: list[Row] = []
    for load in LOADS:
        step_s = profile.step_s(limits.max_batch, limits.max_batch * 200)
        call_s = profile.alone_s(200, 1) + 30 * step_s / limits.max_batch

        def prompt() -> str:
            return words(rng, int(np.exp(rng.uniform(math.log(20), math.log(600)))))

        real = sorted(await play(url, model, poisson(load / call_s, requests, rng, prompt, _OUTPUTS)), key=_sent_s)
        first_s = real[0].sent_s
        plan = single_calls(
            [each.sent_s - first_s for each in real],
            [each.prompt_tokens for each in real],
            [float(each.output_tokens) for each in real],
            "llm",
        )
        outcome = simulate(plan, fleet_of(profile, 1), SimSettings(forecast="oracle"), seed)
        took_s = np.array([each.e2e_s for each in real])
        row: dict[str, Any] = {
            "part": "vllm", "load": load, "requests": requests,
            "median_error": float(np.median(np.abs(outcome.latency() / took_s - 1.0))),
        }  # fmt: skip
        for name, level in (("p50", 0.5), ("p95", 0.95)):
            row[f"real_{name}_s"] = float(np.quantile(took_s, level))
            row[f"simulated_{name}_s"] = float(np.quantile(outcome.latency(), level))
            row[f"ratio_{name}"] = row[f"simulated_{name}_s"] / row[f"real_{name}_s"]
        rows.append(row)
    return rows


def _sent_s(each: Any) -> float:
    return float(each.sent_s)

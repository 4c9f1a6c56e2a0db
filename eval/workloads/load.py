"""How busy a fleet would be, on paper: what each model's replicas are asked for, over what they can do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.workloads.plan import BLOCK_TOKENS, PlannedCall, Workload
from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import Replica

BATCH = 256


def offered_load(
    workload: Workload, fleet: Sequence[Replica], rate_per_s: float | None = None, batch: int = BATCH
) -> dict[str, float]:
    """The busy fraction of each model's replicas, when work is spread by their speed; 1 is all that they can do.

    `rate_per_s` workflows arrive in place of the workload's own mean. A batching engine runs `batch` calls at once, or
    as many as its KV cache holds of this mean size; a token then costs it an iteration's share. Prompt tokens that an
    earlier call of the workload had in front, too, are taken as cached: a best case. Raises ConfigError when the fleet
    lacks a model.
    """
    rate = len(workload.workflows) / workload.workflows[-1].at_s if rate_per_s is None else rate_per_s
    calls: dict[str, list[PlannedCall]] = {}
    fresh: dict[str, list[int]] = {}
    seen: set[int] = set()
    for workflow in workload.workflows:
        for call in workflow.calls:
            calls.setdefault(call.model, []).append(call)
            fresh.setdefault(call.model, []).append(uncached_tokens(call, seen))
            seen.update(call.blocks)
    loads: dict[str, float] = {}
    for model, asked in sorted(calls.items()):
        able = [replica.profile for replica in fleet if replica.model == model]
        if not able:
            raise ConfigError(f"the fleet has no replica of {model}, which the workload calls; choose another fleet.")
        calls_per_s = sum(1.0 / _seconds(profile, asked, float(np.mean(fresh[model])), batch) for profile in able)
        loads[model] = rate * len(asked) / len(workload.workflows) / calls_per_s
    return loads


def busiest(loads: dict[str, float]) -> tuple[str, float]:
    """The model whose replicas are the first to be full, and their busy fraction."""
    model = max(loads, key=lambda name: loads[name])
    return model, loads[model]


def rate_for(workload: Workload, fleet: Sequence[Replica], load: float, batch: int = BATCH) -> float:
    """Workflows per second at which the busiest model is `load` busy: a first guess for a search."""
    return load / busiest(offered_load(workload, fleet, 1.0, batch))[1]


def uncached_tokens(call: PlannedCall, seen: set[int]) -> int:
    """Tokens of the prompt behind the last block of its beginning that was seen."""
    hits = 0
    for name in call.blocks[: call.prompt_tokens // BLOCK_TOKENS]:
        if name not in seen:
            break
        hits += 1
    return call.prompt_tokens - hits * BLOCK_TOKENS


def _seconds(profile: EngineProfile, calls: Sequence[PlannedCall], fresh: float, batch: int) -> float:
    """Of the replica's time that one of these calls takes, on average."""
    work = float(np.mean([call.work for call in calls]))
    if profile.max_batch == 1:
        return profile.call_base_s + work * profile.step_base_s
    # An iteration sees a call's context as long as the call runs: long answers count for more.
    context = float(np.mean([(call.prompt_tokens + call.work / 2.0) * call.work for call in calls])) / work
    size = max(1.0, min(batch, profile.max_batch, profile.kv_capacity_tokens / context))
    token_s = profile.step_base_s / size + profile.decode_seq_s + profile.decode_ctx_token_s * context
    prompt = float(np.mean([call.prompt_tokens for call in calls]))
    prefill_s = fresh * (profile.prefill_token_s + profile.prefill_ctx_token_s * (prompt - fresh / 2.0))
    return profile.call_base_s + work * token_s + prefill_s

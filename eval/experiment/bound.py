"""What no router can beat: each workflow alone in the system, on the fastest device, with every prefix cached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from eval.sim.paths import unloaded
from eval.workloads.plan import BLOCK_TOKENS, PlannedCall, Workload
from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import Replica


def bound_s(workload: Workload, fleet: Sequence[Replica]) -> list[float]:
    """Seconds of each workflow, without any contention.

    For each model a device that has the best of every constant of its replicas. A block of a prompt is taken as cached
    when any other call for the model has the same one, whenever that comes: a router can only do worse.
    """
    fastest = _fastest(fleet)
    had = Counter((call.model, block) for flow in workload.workflows for call in flow.calls for block in call.blocks)
    least_s: list[float] = []
    for workflow in workload.workflows:
        saved = [_saved_s(call, fastest[call.model], had) for call in workflow.calls]
        alone_s = unloaded(workflow, fastest).service_s
        end_s: list[float] = []
        for call, service_s, saved_s in zip(workflow.calls, alone_s, saved, strict=True):
            ready_s = max((end_s[before] for before in call.after), default=0.0) + call.gap_s
            end_s.append(ready_s + service_s - saved_s)
        least_s.append(max(end_s))
    return least_s


def _fastest(fleet: Sequence[Replica]) -> dict[str, EngineProfile]:
    by_model: dict[str, list[EngineProfile]] = {}
    for replica in fleet:
        by_model.setdefault(replica.model, []).append(replica.profile)
    names = [name for name in EngineProfile.__struct_fields__ if name.endswith("_s")]
    return {
        model: msgspec.structs.replace(some[0], **{name: min(getattr(p, name) for p in some) for name in names})
        for model, some in by_model.items()
    }


def _saved_s(call: PlannedCall, profile: EngineProfile, had: Counter[tuple[str, int]]) -> float:
    """The prefill that the longest prefix saves which some other call has, too."""
    cached = 0
    for block in call.blocks[: call.prompt_tokens // BLOCK_TOKENS]:
        if had[call.model, block] < 2:
            break
        cached += BLOCK_TOKENS
    return profile.prefill_token_s * cached + profile.prefill_ctx_token_s * cached * cached / 2.0

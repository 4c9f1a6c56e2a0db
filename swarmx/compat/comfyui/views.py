"""Jobs and servers as the router's policies see them. Pure.

A server is a serial replica whose unit of work is a second: what the job at hand would take where it takes least is its
work, and what another server would need beyond that (a model to load, nodes whose results it does not hold, a slower
device) is the prompt that it has to read first.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from swarmx.agents.kept_view import fixed_columns, fixed_row, keep
from swarmx.compat.comfyui.jobs import Job
from swarmx.core.engine import EngineProfile
from swarmx.core.fleet import CallView, FleetView, WorkflowView
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call, KeptView, SeenWorkflow

_PROFILE = EngineProfile(model="comfyui", device="server", step_base_s=1.0, max_batch=1)
_FIXED = fixed_row(_PROFILE)


def seen_fleet(*, left_s: Sequence[float | None], last_chosen: Sequence[int], extra_s: Sequence[float]) -> FleetView:
    """Servers, each with the seconds that its job should still need, None where it runs none; how manieth it was last
    chosen; and the seconds that the job at hand needs beyond those on the best of them."""
    busy = np.array([left is not None for left in left_s], dtype=np.int64)
    zero, one = np.zeros(len(left_s)), np.ones(len(left_s))
    return FleetView(
        in_flight=busy,
        last_chosen=np.array(last_chosen, dtype=np.int64),
        max_batch=np.ones(len(left_s), dtype=np.int64),
        remaining_work=np.array([left or 0.0 for left in left_s]),
        work_variance=zero,
        weight=busy.astype(np.float64),
        context_tokens=zero,
        prefill_tokens=zero,
        unread_tokens=zero,
        shared_tokens=zero,
        cached_tokens=zero,
        prefill_share=zero,
        slowdown=one,
        kv_capacity_tokens=one * _PROFILE.kv_capacity_tokens,
        max_step_tokens=one * _PROFILE.max_step_tokens,
        cost_weight=one,
        call_base_s=zero,
        step_base_s=one,
        decode_seq_s=zero,
        decode_ctx_token_s=zero,
        prefill_token_s=np.array(extra_s),
        prefill_ctx_token_s=zero,
        running=busy.astype(np.float64),
        waiting=zero,
        kv_usage=zero,
        signal_age_s=zero,
    )


def kept_fleet(view: FleetView) -> KeptView:
    """The servers as a decision keeps them."""
    return keep(view, slice(None), fixed_columns([_fixed_of(extra) for extra in view.prefill_token_s.tolist()]))


def seen_call(job: Job, key: str, least: Forecast, now_s: float, *, waited_s: float, ahead: int) -> CallView:
    """A job is a workflow of one call. `key` is the same for graphs that cost the same, `least` the forecast where it
    takes least."""
    call = Call(
        call_id=job.prompt_id,
        tenant=job.tenant,
        kind="image",
        model="comfyui",
        role="graph",
        workflow_id=job.prompt_id,
        workflow_kind="comfyui",
        node="" if job.part is None else f"part {job.part.number + 1}",
        prompt_key=key,
        prompt_bytes=0,
        prompt_tokens=1,
        work_limit=0.0,
        priority=job.priority,
    )
    alone = WorkflowView(
        kind="comfyui",
        age_s=now_s - job.created_s,
        target_s=0.0,
        remaining_s=least.mean,
        attained_s=0.0,
        attained_work=0.0,
        calls=0,
        past_s=np.zeros(0),
    )
    return CallView(call=call, forecast=least, workflow=alone, now_s=now_s, waited_s=waited_s, ahead=ahead)


def seen_workflow(about: CallView) -> SeenWorkflow:
    """The workflow of a call as a decision keeps it."""
    return SeenWorkflow(**{name: getattr(about.workflow, name) for name in SeenWorkflow.__struct_fields__})


def _fixed_of(extra_s: float) -> bytes:
    return fixed_row(msgspec.structs.replace(_PROFILE, prefill_token_s=extra_s)) if extra_s else _FIXED

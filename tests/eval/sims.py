"""Small fleets and workloads to simulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.workloads.plan import PlannedCall, PlannedWorkflow, Workload
from swarmx.core.engine import EngineProfile
from swarmx.core.forecast import LEVELS
from swarmx.core.nouns import Replica

LLM = EngineProfile(
    model="m",
    device="gpu",
    step_base_s=0.01,
    decode_seq_s=0.0005,
    decode_ctx_token_s=1e-7,
    prefill_token_s=5e-5,
    prefill_ctx_token_s=1e-9,
    call_base_s=0.004,
    kv_capacity_tokens=64 * 400,
    max_batch=8,
    max_step_tokens=2048,
)


def replicas(count: int, profile: EngineProfile = LLM, *, model: str = "m", first: int = 0) -> list[Replica]:
    """So many replicas, alike."""
    kind = "image" if profile.max_batch == 1 else "llm"
    return [
        Replica(
            replica_id=f"{model}{first + i}",
            model=model,
            kind=kind,  # type: ignore[arg-type]
            device=profile.device,
            url="",
            profile=profile,
            provider="simulated",
            emulated=True,
        )
        for i in range(count)
    ]


def call(**about: Any) -> PlannedCall:
    """100 tokens in, 50 out; no prefix that anybody shares."""
    usual: dict[str, Any] = {
        "role": "writer", "model": "m", "kind": "llm", "after": (), "gap_s": 0.0, "prompt_tokens": 100, "work": 50.0,
        "work_limit": 500.0, "blocks": (), "forecast": 0,
    }  # fmt: skip
    return PlannedCall(**(usual | about))


def workload(flows: Sequence[tuple[float, Sequence[PlannedCall]]], *, kind: str = "report") -> Workload:
    """Workflows at their times; every forecast is 50, give or take."""
    return Workload(
        name="small",
        workflows=[
            PlannedWorkflow(workflow_id=f"w{i}", kind=kind, at_s=at_s, calls=tuple(calls))
            for i, (at_s, calls) in enumerate(flows)
        ],
        quantiles=np.array([np.linspace(20.0, 90.0, len(LEVELS))], dtype=np.float32),
    )

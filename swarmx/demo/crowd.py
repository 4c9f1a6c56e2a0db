"""The demo's second part: a flash crowd on one model, with the scaler, the coordinator and an operator at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from swarmx.client import Api
from swarmx.core.engine import profiles
from swarmx.core.errors import ReplicaError, SwarmXError
from swarmx.demo.arrivals import Arrival, all_workflows, submit, voids
from swarmx.demo.corpus import flow, openers
from swarmx.demo.fleet import MODELS, server

CROWDED = "qwen3-8b"
DEVICE = "l40s"
_SLOTS = 4  # calls that one replica runs at a time: keeps a crowd within what two cores can emulate
_KIND = "research"  # its searches fan out over the small model
QUESTION = "What changed in the last ten minutes?"
_LIMIT_S = 900.0
_MODEL_START_S = 300.0
_SAMPLE_S = 0.5
_CHECKED_EVERY = 10  # samples, between two looks at how late the emulation is


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """When how many workflows come, in emulated seconds: `base_per_s` always, `peak_per_s` during the crowd."""

    base_per_s: float = 0.15
    peak_per_s: float = 2.4
    begins_s: float = 60.0
    ends_s: float = 180.0
    over_s: float = 300.0


class CrowdRun(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it; times in wall seconds, `at_s` since the start.

    `samples` are (at_s, replicas held, replicas ready), `answer` is what the console says to `QUESTION`.
    """

    workflows: list[dict[str, Any]]
    samples: list[tuple[float, int, int]]
    alerts: list[dict[str, Any]]
    proposals: list[dict[str, Any]]
    records: list[dict[str, Any]]
    sound: bool
    voids: list[str]
    answer: list[str]
    began_at_s: float
    seconds: float


def arrivals(crowd: Crowd, *, seed: int, time_scale: float) -> list[Arrival]:
    """A Poisson process whose rate jumps up and down again."""
    rng = np.random.default_rng(seed)
    tasks = openers(_KIND)
    order = rng.permutation(len(tasks))
    rows: list[Arrival] = []
    now_s = 0.0
    while True:
        now_s += float(rng.exponential(1.0 / crowd.peak_per_s))
        if now_s >= crowd.over_s:
            return rows
        in_crowd = crowd.begins_s <= now_s < crowd.ends_s
        if not in_crowd and rng.random() >= crowd.base_per_s / crowd.peak_per_s:
            continue
        task = tasks[order[len(rows) % len(tasks)]]
        rows.append(Arrival(at_s=now_s / time_scale, kind=_KIND, spec=flow(_KIND, task, MODELS)))


def settings(
    *,
    time_scale: float,
    seed: int,
    scaler: Mapping[str, Any],
    bounds: tuple[int, int, int],
    coordinator: Mapping[str, Any],
    start_s: float = 40.0,
) -> dict[str, Any]:
    """A server whose small model can be scaled within `bounds` (min, max, limit) and whose others are plenty."""
    least, most, limit = bounds
    return {
        "emulation": {"time_scale": time_scale, "seed": seed},
        "emulated": [{"model": MODELS["large"], "device": "h100", "count": 2, "size_class": "32b"}],
        "elastic": [
            {
                "model": CROWDED,
                "device": DEVICE,
                "size_class": "8b",
                "slots": _SLOTS,
                "min": least,
                "max": most,
                "limit": limit,
                "start_s": start_s,
            }
        ],
        # Wall seconds; the fleet runs `time_scale` times faster, and so do those who watch it.
        "router": {"demand_every_s": 2.0 / time_scale},
        "scaler": {
            "every_s": 3.0 / time_scale,
            "up_cooldown_s": 3.0 / time_scale,
            "down_cooldown_s": 60.0 / time_scale,
            "alert_every_s": 30.0 / time_scale,
            "parameters": {"target_in_flight": 3.0},
            **scaler,
        },
        "guard": {"verify_s": 60.0 / time_scale, "bounds_step": 2, "cooldown_s": {"set_replica_bounds": 1.0}},
        "coordinator": {"gap_s": 1.0, "every_s": 300.0, **coordinator},
    }


async def run_crowd(
    wanted: Mapping[str, Any], todo: Sequence[Arrival], folder: Path, *, operator: bool, console: Console | None = None
) -> CrowdRun:
    """Submit the arrivals and follow the fleet until all have ended; with `operator`, approve what is proposed."""
    async with server(wanted, folder) as api:
        await _model_is_up(api)
        began_at_s, start_s = time.time(), time.monotonic()
        submitting = asyncio.create_task(submit(api, todo, start_s))
        approving = asyncio.create_task(_approve(api, console)) if operator else None
        samples: list[tuple[float, int, int]] = []
        late: dict[str, str] = {}
        try:
            while True:
                if submitting.done():
                    submitting.result()
                at_s = time.monotonic() - start_s
                row = next(m for m in (await api.get("/api/v1/scaling"))["models"] if m["model"] == CROWDED)
                held = row["ready"] + row["starting"] + row["cordoned"] + row["draining"]
                samples.append((at_s, held, row["ready"]))
                if len(samples) % _CHECKED_EVERY == 0:  # a replica may be gone at the end
                    late |= await voids((await api.get("/api/v1/replicas"))["replicas"])
                rows = await all_workflows(api)
                if len(rows) == len(todo) and all(r["ended_at_s"] is not None for r in rows):
                    break
                if at_s > _LIMIT_S:
                    raise ReplicaError(f"the crowd had not passed after {_LIMIT_S:g} s; see the server's log.")
                await asyncio.sleep(_SAMPLE_S)
        finally:
            submitting.cancel()
            if approving is not None:
                approving.cancel()
        seconds = time.monotonic() - start_s
        late |= await voids((await api.get("/api/v1/replicas"))["replicas"])
        return CrowdRun(
            workflows=rows,
            samples=samples,
            alerts=(await api.get("/api/v1/scaling"))["alerts"],
            proposals=(await api.get("/api/v1/proposals"))["proposals"],
            records=(await api.get("/api/v1/audit", limit=1000))["records"],
            sound=(await api.get("/api/v1/audit/verify"))["sound"],
            voids=[f"{replica_id}: {why}" for replica_id, why in late.items()],
            answer=[
                event["text"]
                async for name, event in api.stream("/api/v1/console", json={"text": QUESTION})
                if name == "text"
            ],
            began_at_s=began_at_s,
            seconds=seconds,
        )


def cost(run: CrowdRun) -> float:
    """Replica seconds (wall) times device weight, from the first arrival to the last end."""
    times = [at_s for at_s, _, _ in run.samples] + [run.seconds]
    held = [count for _, count, _ in run.samples]
    weight = profiles()[CROWDED, DEVICE].cost_weight
    return weight * sum(n * (end - begin) for n, begin, end in zip(held, times, times[1:], strict=False))


async def _model_is_up(api: Api) -> None:
    """A model of our own takes about a minute to start; the crowd waits for it."""
    async with asyncio.timeout(_MODEL_START_S):
        while True:
            status = await api.get("/api/v1/coordinator")
            if status["is_up"] or status["engine"] != "vllm":
                return
            await asyncio.sleep(_SAMPLE_S)


async def _approve(api: Api, console: Console | None) -> None:
    """The operator of the demo: reads each proposal and says yes."""
    while True:
        for proposal in (await api.get("/api/v1/proposals", state="open"))["proposals"]:
            try:
                await api.post(f"/api/v1/proposals/{proposal['proposal_id']}/approve")
            except SwarmXError as error:
                if console is not None:
                    console.print(f"{proposal['proposal_id']} could not be approved: {error}")
        await asyncio.sleep(_SAMPLE_S)

"""The simulator against the emulated fleet: the same workflows at the same times, through a real gateway over HTTP.

Where a router chooses, a few milliseconds lead to other choices and in the end to other queues, in the real fleet as in
the simulated one. So the simulated side is many runs, whose submissions differ by milliseconds: what one of them is off
from the middle of them is what a perfect simulator would be off from one real run.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from eval.emulator import words
from eval.result import Row
from eval.sim.settings import SimSettings
from eval.sim.simulate import simulate
from eval.workloads.plan import PlannedCall, PlannedWorkflow, Workload
from swarmx.agents.router_settings import RouterSettings
from swarmx.client import Api
from swarmx.core.engine import profiles
from swarmx.core.errors import ReplicaError
from swarmx.core.fleet import Floats
from swarmx.core.forecast import LEVELS
from swarmx.core.nouns import Replica
from swarmx.demo.arrivals import all_workflows, voids
from swarmx.demo.fleet import server
from swarmx.providers.emulated.truth import Prompt, Truth, length_factors, prompt_tokens, recorded

SMALL, LARGE = "qwen3-8b", "qwen3-32b"
SLOTS = 6
Fleet = tuple[tuple[str, str, int], ...]
# With one replica a model nothing but time is at stake; on the other, the router chooses, and small differences of time
# lead to other choices: there only distributions can be compared.
FLEETS: Mapping[str, Fleet] = {
    "one a model": ((SMALL, "l40s", 1), (LARGE, "h100", 1)),
    "five, mixed": ((SMALL, "l40s", 2), (SMALL, "h100", 1), (LARGE, "l40s", 1), (LARGE, "h100", 1)),
}
_CLASSES = {SMALL: "8b", LARGE: "32b"}
_LIMIT = 600
_PATIENCE_S = 600.0
_TOLD_S = 3.0  # the shortest time between two looks at the list of workflows
_RUNS = 16
_NUDGE_S = 0.005  # about what a hop or a timer of a real process is off
_LEVELS = (("p50", 0.5), ("p95", 0.95))

# (role, model, after, bytes of its own prompt): nothing depends on what a model answered.
_SHAPES: Mapping[str, Sequence[tuple[str, str, tuple[int, ...], int]]] = {
    "chain": (("ask", SMALL, (), 1500), ("think", LARGE, (0,), 4000), ("say", SMALL, (1,), 2500)),
    "fan": (
        ("plan", LARGE, (), 2000), *(("part", SMALL, (0,), 3000) for _ in range(4)),
        ("join", LARGE, (1, 2, 3, 4), 6000),
    ),
    "single": (("chat", SMALL, (), 1200),),
}  # fmt: skip


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A run of the real gateway, as it is kept.

    `times` are (submitted, ended) on the gateway's clock, in wall seconds, of each workflow that `declare` makes again
    from the seed. `late` are the emulated replicas that fell behind their clocks.
    """

    fleet: str
    policy: str
    seed: int
    time_scale: float
    load: float
    times: list[tuple[float, float]]
    late: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A workflow as it is submitted, and with its truth; `planned` is in wall seconds, its times still to come."""

    spec: dict[str, Any]
    planned: PlannedWorkflow


def declare(count: int, seed: int) -> list[Declared]:
    """So many workflows of three kinds in turn; each prompt is its own, so that nothing is found in a cache."""
    truths = {
        model: Truth(rows=recorded(), model=model, size_class=size_class, factors=length_factors(), seed=seed)
        for model, size_class in _CLASSES.items()
    }
    rng = np.random.default_rng([seed, 0x177])
    made: list[Declared] = []
    for number in range(count):
        kind = list(_SHAPES)[number % len(_SHAPES)]
        nodes: dict[str, Any] = {}
        calls: list[PlannedCall] = []
        for place, (role, model, after, size) in enumerate(_SHAPES[kind]):
            prompt = words(rng, int(size * rng.uniform(0.4, 1.6) / 6.5))
            text = f"<|user|>\n{prompt}\n"
            answer = truths[model].answer(Prompt(system="", user=prompt, text=text, max_tokens=_LIMIT))
            nodes[f"n{place}"] = {
                "kind": "llm", "model": model, "role": role, "prompt": prompt, "max_tokens": _LIMIT,
                "needs": [f"n{i}" for i in after],
            }  # fmt: skip
            calls.append(
                PlannedCall(
                    role=role, model=model, kind="llm", after=after, gap_s=0.0, prompt_tokens=prompt_tokens(text),
                    work=float(len(answer.pieces)), work_limit=float(_LIMIT), blocks=(), forecast=0,
                )
            )  # fmt: skip
        made.append(
            Declared(
                spec={"name": kind, "kind": kind, "nodes": nodes},
                planned=PlannedWorkflow(workflow_id=str(number), kind=kind, at_s=0.0, calls=tuple(calls)),
            )
        )
    return made


def simulated_fleet(fleet: Fleet, time_scale: float) -> list[Replica]:
    """The emulated replicas, as the gateway knows them: in wall seconds."""
    return [
        Replica(
            replica_id=f"{model}-{device}-{i}", model=model, kind="llm", device=device, url="",
            profile=msgspec.structs.replace(profiles()[model, device], max_batch=SLOTS).scaled(time_scale),
            provider="emulated", emulated=True,
        )
        for model, device, count in fleet
        for i in range(count)
    ]  # fmt: skip


async def measure(
    fleet: Fleet,
    todo: Sequence[Declared],
    at_s: Sequence[float],
    policy: str,
    *,
    time_scale: float,
    seed: int,
    folder: Path,
) -> tuple[list[tuple[float, float]], list[str]]:
    """(submitted, ended) of each workflow on the gateway's clock, and which emulated replicas fell behind theirs."""
    settings = {
        "router": {"policy": policy},
        "predictor": {"engine": "empirical"},
        "emulation": {"time_scale": time_scale, "seed": seed},
        "emulated": [
            {"model": model, "device": device, "count": count, "size_class": _CLASSES[model], "slots": SLOTS}
            for model, device, count in fleet
        ],
    }
    async with server(settings, folder) as api:
        start_s = time.monotonic() + 0.5
        ids = await asyncio.gather(*(_submit(api, one, start_s + t) for one, t in zip(todo, at_s, strict=True)))
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            rows = {row["workflow_id"]: row for row in await all_workflows(api)}
            if all(rows[each]["ended_at_s"] is not None for each in ids):
                break
            if time.monotonic() > deadline_s:
                raise ReplicaError(f"workflows had not ended after {_PATIENCE_S:g} s")
            await asyncio.sleep(_TOLD_S)
        failed = [rows[each] for each in ids if rows[each]["state"] != "finished"]
        if failed:
            raise ReplicaError(f"{len(failed)} workflows did not finish; the first: {failed[0]}")
        late = await voids((await api.get("/api/v1/replicas"))["replicas"])
        times = [(rows[each]["created_at_s"], rows[each]["ended_at_s"]) for each in ids]
        return times, [f"{replica_id}: {why}" for replica_id, why in late.items()]


async def _submit(api: Api, one: Declared, at_s: float) -> str:
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))
    workflow_id: str = (await api.post("/api/v1/workflows", json=one.spec))["workflow_id"]
    return workflow_id


def imitate(
    fleet: Fleet,
    todo: Sequence[Declared],
    submitted_s: Sequence[float],
    policy: str,
    *,
    time_scale: float,
    seed: int,
) -> Floats:
    """How long the same workflows take in the simulator, [workflows], in wall seconds.

    They are submitted at these times from 0 on, each nudged by some milliseconds that the seed decides.
    """
    nudges_s = np.random.default_rng([seed, 0x179]).normal(0.0, _NUDGE_S, len(todo))
    at_s = np.maximum(0.0, np.asarray(submitted_s) + nudges_s)
    order = at_s.argsort(kind="stable")
    plan = Workload(
        name="declared",
        workflows=[msgspec.structs.replace(todo[i].planned, at_s=float(at_s[i])) for i in order],
        quantiles=np.ones((1, len(LEVELS)), dtype=np.float32),
    )
    router = RouterSettings(policy=policy, seed=seed, log_decisions=False, demand_every_s=0.0)
    outcome = simulate(plan, simulated_fleet(fleet, time_scale), SimSettings(router=router, forecast="role_quantiles"))
    took_s = np.empty(len(todo))
    took_s[order] = outcome.workflows.end_s - outcome.workflows.at_s
    return took_s


async def measured(name: str, policy: str, count: int, *, time_scale: float, load: float, seed: int) -> Measured:
    """Run `count` workflows on a real gateway with the emulated fleet of that name.

    `load` is the share of the fleet's seats that calls would fill if each took as long as on an idle replica.
    """
    fleet, todo = FLEETS[name], declare(count, seed)
    alone_s = sum(_middling(fleet, call) for one in todo for call in one.planned.calls) / time_scale
    gap_s = alone_s / (SLOTS * sum(number for _, _, number in fleet)) / load / count
    at_s = np.cumsum(np.random.default_rng([seed, 0x178]).exponential(gap_s, size=count)).tolist()
    with tempfile.TemporaryDirectory(prefix="swarmx-validation-") as folder:
        times, late = await measure(fleet, todo, at_s, policy, time_scale=time_scale, seed=seed, folder=Path(folder))
    return Measured(fleet=name, policy=policy, seed=seed, time_scale=time_scale, load=load, times=times, late=late)


def compared(run: Measured, runs: int = _RUNS) -> list[Row]:
    """A row a kind, and one for all; times in emulated seconds.

    Simulated quantiles are medians over `runs`; `noise` is the distance from them, as a share, that 95 of 100 runs
    keep. `median_ratio` and `median_error` are of workflows, simulated (the median run) over real.
    """
    todo = declare(len(run.times), run.seed)
    created_s, ended_s = np.array(run.times).T
    real = (ended_s - created_s) * run.time_scale
    submitted_s = (created_s - created_s.min()).tolist()
    ours = run.time_scale * np.array(
        [
            imitate(FLEETS[run.fleet], todo, submitted_s, run.policy, time_scale=run.time_scale, seed=number)
            for number in range(runs)
        ]
    )
    rows: list[Row] = []
    for kind in (*_SHAPES, "all"):
        mine = np.array([kind in ("all", one.planned.kind) for one in todo])
        row: dict[str, Any] = {
            "part": "emulated", "fleet": run.fleet, "policy": run.policy, "kind": kind, "workflows": int(mine.sum()),
            "time_scale": run.time_scale, "load": run.load, "late": "; ".join(run.late),
        }  # fmt: skip
        for title, level in _LEVELS:
            found = np.quantile(ours[:, mine], level, axis=1)
            middle = float(np.median(found))
            row[f"real_{title}_s"] = float(np.quantile(real[mine], level))
            row[f"simulated_{title}_s"] = middle
            row[f"ratio_{title}"] = middle / row[f"real_{title}_s"]
            row[f"noise_{title}"] = float(np.quantile(np.abs(found / middle - 1.0), 0.95))
        each = np.median(ours[:, mine], axis=0) / real[mine]
        row["median_ratio"] = float(np.median(each))
        row["median_error"] = float(np.median(np.abs(each - 1.0)))
        rows.append(row)
    return rows


def _middling(fleet: Fleet, call: PlannedCall) -> float:
    """Seconds that the call takes on an idle replica, the mean over those of its model."""
    same = [(device, number) for model, device, number in fleet if model == call.model]
    total_s = sum(profiles()[call.model, device].alone_s(call.prompt_tokens, call.work) * n for device, n in same)
    return total_s / sum(n for _, n in same)

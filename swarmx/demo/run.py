"""`swarmx demo`: the main job, end to end, under two routing policies with the same arrivals."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from swarmx.agents.policies import DEFAULT_POLICY
from swarmx.client import Api
from swarmx.core.errors import ReplicaError
from swarmx.demo import crowd, report
from swarmx.demo.arrivals import Arrival, all_workflows, submit, voids
from swarmx.demo.corpus import KINDS, flow, openers
from swarmx.demo.crowd_report import show_crowd, summarise_crowd
from swarmx.demo.fleet import EMULATED, MODELS, server
from swarmx.demo.vllm import vllm_fleet

BASELINE = "round_robin"
_ARRIVALS_PER_S = 0.9  # workflows a second of emulated time: keeps the image servers about two thirds busy
_CPU_TEXT_TOKENS = 64  # a CPU writes a few tokens a second: keeps the real run to minutes
_PASS_LIMIT_S = 1800.0
_SHAPE = crowd.Crowd()
_MODEL_DEADLINE_S = 240.0  # a small model on two cores that also emulate a fleet takes a minute or two for a turn


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy made of the arrivals; times in wall seconds."""

    policy: str
    workflows: list[dict[str, Any]]
    replicas: list[dict[str, Any]]
    explained: dict[str, Any] | None
    voids: list[str]
    seconds: float
    forecasts: list[dict[str, Any]] = []


def arrivals(
    count: int, *, seed: int, per_s: float, models: Mapping[str, str], longest_text: int = 32_768
) -> list[Arrival]:
    """Poisson arrivals; the kinds take turns and each walks through its own tasks in a shuffled order."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(1.0 / per_s, size=count))
    order = {kind: rng.permutation(len(openers(kind))) for kind in KINDS}
    rows = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        tasks = openers(kind)
        task = tasks[order[kind][(i // len(KINDS)) % len(tasks)]]
        rows.append(Arrival(at_s=float(at_s[i]), kind=kind, spec=flow(kind, task, models, longest_text=longest_text)))
    return rows


async def run_demo(
    *,
    workflows: int | None,
    time_scale: float,
    seed: int,
    engine: str,
    coordinator: str,
    part: str,
    model: Path | None,
    keep: Path | None,
    console: Console,
) -> dict[str, Any]:
    """The routing part (both passes, the table, one explained decision), then the crowd. Returns what --json prints."""
    with tempfile.TemporaryDirectory(prefix="swarmx-demo-") as temporary:
        folder = keep or Path(temporary)
        passes: list[Pass] = []
        if part in ("all", "routing"):
            vllm = engine == "vllm"
            passes = await (
                _passes_on_vllm(workflows or 3, seed, model, folder, console)
                if vllm
                else _passes_on_emulation(workflows or 120, time_scale, seed, folder, console)
            )
        result = report.summarise(passes, engine=engine, scale=1.0 if engine == "vllm" else time_scale, seed=seed)
        if passes:
            report.show(console, result, passes)
        if part in ("all", "crowd"):
            result["rows"] += await _crowd(coordinator, model, time_scale, seed, folder / "crowd", console)
        if keep is not None:
            (keep / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
            console.print(f"Databases, journals, audit logs and result.json are in {keep}.")
        return result


async def _passes_on_vllm(workflows: int, seed: int, model: Path | None, folder: Path, console: Console) -> list[Pass]:
    async with vllm_fleet(folder, model, console) as fleet:
        console.print(fleet.label)
        todo = arrivals(workflows, seed=seed, per_s=0.2, models=fleet.models, longest_text=_CPU_TEXT_TOKENS)
        return await _passes(fleet.settings, todo, folder, console)


async def _passes_on_emulation(
    workflows: int, time_scale: float, seed: int, folder: Path, console: Console
) -> list[Pass]:
    console.print(
        f"An [bold]emulated[/] fleet: 12 replicas, 3 models on 3 device types, {time_scale:g} times faster "
        "than real. Times below are in emulated seconds."
    )
    settings = {"emulation": {"time_scale": time_scale, "seed": seed}, "emulated": EMULATED}
    todo = arrivals(workflows, seed=seed, per_s=_ARRIVALS_PER_S * time_scale, models=MODELS)
    return await _passes(settings, todo, folder, console)


async def _crowd(
    coordinator: str, model: Path | None, time_scale: float, seed: int, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """A flash crowd on one model, with everybody at work."""
    thinks = "a real vLLM on this CPU" if coordinator == "vllm" else "the built-in rules"
    console.print(
        f"\nA [bold]flash crowd[/]: {_SHAPE.peak_per_s / _SHAPE.base_per_s:.0f} times the usual workflows for "
        f"{_SHAPE.ends_s - _SHAPE.begins_s:.0f} emulated seconds, on one model that may have 2 replicas. The scaler "
        f"starts what it may; the coordinator ({thinks}) proposes more; the demo approves as its operator."
    )
    thinking: dict[str, Any] = {"engine": coordinator, "deadline_s": _MODEL_DEADLINE_S}
    if model is not None:
        thinking["folder"] = str(model)
    wanted = crowd.settings(time_scale=time_scale, seed=seed, scaler={}, bounds=(1, 2, 8), coordinator=thinking)
    todo = crowd.arrivals(_SHAPE, seed=seed, time_scale=time_scale)
    with console.status("The crowd comes and goes"):
        run = await crowd.run_crowd(wanted, todo, folder, operator=True, console=console)
    rows = summarise_crowd(run, _SHAPE, scale=time_scale, seed=seed, coordinator=coordinator)
    show_crowd(console, rows, run, scale=time_scale)
    return rows


async def _passes(settings: Mapping[str, Any], todo: Sequence[Arrival], folder: Path, console: Console) -> list[Pass]:
    passes = []
    for policy in (BASELINE, DEFAULT_POLICY):
        own = {**settings, "router": {"policy": policy}}
        passes.append(await _one_pass(policy, server(own, folder / policy), todo, console))
    return passes


async def _one_pass(
    policy: str, running: AbstractAsyncContextManager[Api], todo: Sequence[Arrival], console: Console
) -> Pass:
    """Submit every workflow at its time, watch until all have ended, collect what is worth telling."""
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.fields[note]}"), console=console, transient=not console.is_terminal
    ) as bar:
        line = bar.add_task(policy, total=len(todo), note="starting the fleet")
        async with running as api:
            start_s = time.monotonic()
            submitting = asyncio.create_task(submit(api, todo, start_s))
            try:
                rows = await _watch(api, len(todo), submitting, bar, line)
            finally:
                submitting.cancel()
            seconds = time.monotonic() - start_s
            replicas = (await api.get("/api/v1/replicas"))["replicas"]
            return Pass(
                policy=policy,
                workflows=rows,
                replicas=replicas,
                explained=await _explained(api, rows),
                voids=[f"{replica_id}: {why}" for replica_id, why in (await voids(replicas)).items()],
                seconds=seconds,
                forecasts=(await api.get("/api/v1/predictor"))["observed"],
            )


async def _watch(
    api: Api, total: int, submitting: asyncio.Task[None], bar: Progress, line: Any
) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + _PASS_LIMIT_S
    while time.monotonic() < deadline_s:
        if submitting.done():
            submitting.result()
        rows = await all_workflows(api)
        ended = sum(row["ended_at_s"] is not None for row in rows)
        bar.update(line, completed=ended, note=f"{len(rows) - ended} running")
        if ended == total:
            bar.update(line, note="done")
            return rows
        await asyncio.sleep(0.5)
    raise ReplicaError(f"{total - ended} workflows had not ended after {_PASS_LIMIT_S:g} s; see the server's log.")


async def _explained(api: Api, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The decision about the longest language-model call of the slowest workflow that finished."""
    finished = [row for row in rows if row["state"] == "finished"]
    if not finished:
        return None
    slowest = max(finished, key=lambda row: float(row["ended_at_s"] - row["created_at_s"]))
    details = await api.get(f"/api/v1/workflows/{slowest['workflow_id']}")
    calls = [call for call in details["calls"] if call["kind"] == "llm"]
    longest = max(calls, key=lambda call: float(call["ended_at_s"] - call["ready_at_s"]))
    why = await api.get(f"/api/v1/calls/{longest['call_id']}/why")
    explained: dict[str, Any] = why["decisions"][-1]
    return explained

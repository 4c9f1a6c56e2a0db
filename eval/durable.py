"""Durable steps of workflows: `steps` measures how many a second, `kills` whether they outlive a killed process."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from eval.doomed import check_lives
from eval.gateway_lives import live
from eval.promises import lines_of
from eval.result import Row, claim, table, write_result
from swarmx.core.records import ModelRequest, ModelResult
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.clock import WallClock
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.state_config import StateSection
from swarmx.wiring.state import open_state
from swarmx.workflows.nodes import WorkflowSpec
from swarmx.workflows.spec import parse_workflow

Synchronous = Literal["FULL", "NORMAL"]

_WARM_UP = 64  # workflows before the clock starts


class _AtOnce:
    """A caller that answers at once: what is measured is the workflows and the store."""

    async def complete(self, request: ModelRequest) -> ModelResult:
        answer = {"choices": [{"message": {"content": "a short answer"}, "finish_reason": "stop"}]}
        return ModelResult(call_id=request.request_id, replica_id="r", attempts=1, answer=answer)


async def measure(
    state: StateSection,
    where: str,
    *,
    concurrent: int,
    workflows: int,
    nodes: int,
    synchronous: Synchronous = "FULL",
) -> Row:
    """Run so many chains of `nodes` calls, `concurrent` at a time, on a store as a server opens it.

    A step is a node's answer, in the store in one commit with what follows from it. The CPU is that of all threads.
    No server has SQLite with another `synchronous` than FULL: it shows what the waits for the disk cost.
    """
    async with AsyncExitStack() as stack:
        opened = await open_state(state, stack, clock=WallClock().now_s)
        store = opened.store
        if synchronous != "FULL":
            store = SqliteStore(state.dir / f"{synchronous}.db", synchronous=synchronous)
            await store.open()
            stack.push_async_callback(store.close)
        runner = WorkflowRunner(store, _AtOnce(), WallClock(), exclusive=opened.exclusive)
        stack.push_async_callback(runner.close)
        return await _measured(runner, where, concurrent=concurrent, workflows=workflows, nodes=nodes)


async def _measured(runner: WorkflowRunner, where: str, *, concurrent: int, workflows: int, nodes: int) -> Row:
    spec = _chain(nodes)
    await asyncio.gather(*(_one(runner, spec) for _ in range(_WARM_UP)))
    left = iter(range(workflows))
    taken_s: list[float] = []

    async def worker() -> None:
        for _ in left:
            begun_s = time.perf_counter()
            await _one(runner, spec)
            taken_s.append(time.perf_counter() - begun_s)

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(concurrent)))
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    p50, p99 = np.quantile(taken_s, (0.5, 0.99))
    steps = workflows * nodes
    return {
        "experiment": "durable_steps",
        "where": where,
        "concurrent": concurrent,
        "workflows": workflows,
        "steps": steps,
        "steps_a_second": round(steps / wall_s, 1),
        "cpu_us_a_step": round(1e6 * cpu_s / steps, 1),
        "workflow_p50_ms": round(1e3 * float(p50), 1),
        "workflow_p99_ms": round(1e3 * float(p99), 1),
    }


def _chain(nodes: int) -> WorkflowSpec:
    first = {"kind": "llm", "model": "m", "prompt": "begin"}
    rest = {f"n{i}": {"kind": "llm", "model": "m", "prompt": f"{{{{ n{i - 1}.text }}}}"} for i in range(1, nodes)}
    return parse_workflow({"name": "chain", "nodes": {"n0": first, **rest}})


async def _one(runner: WorkflowRunner, spec: WorkflowSpec) -> None:
    workflow_id = await runner.submit(spec, {}, "a")
    record = await runner.wait(workflow_id, "a")
    assert record.state == "finished"


async def _steps(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with TemporaryDirectory(dir=args.out) as folder:
        local = StateSection(dir=Path(folder))
        places: list[tuple[str, StateSection, Synchronous]] = [("sqlite", local, "FULL")]
        if args.normal:
            places.append(("sqlite, synchronous=NORMAL", local, "NORMAL"))
        if args.postgres:
            places.append(("postgres", StateSection(dir=Path(folder), database=args.postgres), "FULL"))
        for where, state, synchronous in places:
            for concurrent in args.concurrent:
                size = {"concurrent": concurrent, "workflows": args.workflows, "nodes": args.nodes}
                rows.append(await measure(state, where, synchronous=synchronous, **size))
    print(table(rows))
    rates = {row["concurrent"]: row["steps_a_second"] for row in rows if row["where"] == "sqlite"}
    claims = [claim("durable_steps_a_second@64", float(rates[64] or 0.0), ">=", 2000.0)] if 64 in rates else []
    print(write_result(args.out, " ".join(["python -m eval.durable", *args.given]), rows, claims, seeds=[]))
    return 0


async def _kills(args: argparse.Namespace) -> int:
    with TemporaryDirectory() as folder:
        if args.gateway or args.postgres:
            tally = await live(Path(folder), args.lives, args.seed, postgres=args.postgres)
        else:
            command = [sys.executable, "-m", "eval.doomed", folder, str(args.lives), str(args.seed)]
            await asyncio.to_thread(subprocess.run, command, check=True)
            tally = await check_lives(Path(folder))
    print("\n".join(lines_of(tally)))
    return 1 if tally.broken else 0


async def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval durable", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    steps = verbs.add_parser("steps", help="durable steps a second, and the CPU of one in this process")
    steps.add_argument("--concurrent", type=int, nargs="+", default=[64])
    steps.add_argument("--workflows", type=int, default=2000)
    steps.add_argument("--nodes", type=int, default=5, help="calls of a workflow, one after the other")
    steps.add_argument("--normal", action="store_true", help="SQLite that does not wait for the disk, too")
    steps.add_argument("--postgres", default="", help="URL of an empty database to measure, too")
    steps.add_argument("--out", type=Path, required=True, help="folder for the result, on the disk to be measured")
    kills = verbs.add_parser("kills", help="kill a process again and again, then check what is left")
    kills.add_argument("--lives", type=int, default=500)
    kills.add_argument("--seed", type=int, default=1)
    kills.add_argument("--gateway", action="store_true", help="of whole gateways with clients, not of bare runners")
    kills.add_argument("--postgres", default="", help="URL of an empty database that two gateways share")
    args = parser.parse_args(arguments, argparse.Namespace(given=arguments))
    return await (_steps(args) if args.verb == "steps" else _kills(args))


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))

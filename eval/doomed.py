"""Short lives of a process that runs workflows, each killed at a random point; and what must be true after them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np

from swarmx.core import failpoints
from swarmx.core.failures import Failure
from swarmx.core.records import TERMINAL, CallRecord, Idempotency, ModelRequest, ModelResult, WorkflowRecord
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.clock import WallClock
from swarmx.runtime.workflow_run import ending_of
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.events import Cancelled, Failed, Finished, NodeFinished, decode_event
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run

SPEC = """
name: doomed
nodes:
  plan: {kind: llm, model: m, prompt: plan, retry: {attempts: 4, backoff_s: 0.01}}
  each:
    kind: map
    over: "[1, 2, 3]"
    do: {work: {kind: llm, model: m, prompt: "{{ item }} of {{ plan.text }}", retry: {attempts: 4, backoff_s: 0}}}
  route:
    kind: branch
    cases: [{when: each | length == 3, do: {good: {kind: llm, model: m, prompt: good}}}]
    else: {do: {bad: {kind: llm, model: m, prompt: bad}}}
  sum_up: {kind: llm, model: m, prompt: "{{ route.text }}", needs: [each]}
"""
_PER_LIFE = 3
_FAILING = 0.15
_CANCELLED = 0.1
_KILLED = 0.05
_MOST_HITS = 100  # of failpoints before a life ends
_MOST_S = 0.2


@dataclass(slots=True)
class Tally:
    """What came of all lives. `broken` says, a line each, which promise was not kept; nothing should stand there."""

    lives: int = 0
    killed: int = 0
    workflows: int = 0
    states: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    calls_made: int = 0
    calls_finished: int = 0
    broken: list[str] = field(default_factory=list)


class Script:
    """A caller that answers by what it is asked, fails at times, and notes each call outside the database."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self._ledger = os.open(folder / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._rng = rng

    async def complete(self, request: ModelRequest) -> ModelResult:
        os.write(self._ledger, f"{time.time()!r} {request.idempotency_key} {request.request_id}\n".encode())
        await asyncio.sleep(float(self._rng.uniform(0.0, 0.004)))
        call_id = f"call_{uuid4().hex}"
        failed = self._rng.random() < _FAILING and "sum_up" not in request.node and "good" not in request.node
        record = _record(request, call_id, failed=failed)
        if failed:
            failure = Failure(cause="replica", error="it broke")
            return ModelResult(call_id=call_id, replica_id=None, attempts=1, failure=failure, record=record)
        text = f"{zlib.crc32(request.idempotency_key.encode()):08x}"
        answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        return ModelResult(call_id=call_id, replica_id="r", attempts=1, answer=answer, record=record)


def _record(request: ModelRequest, call_id: str, *, failed: bool) -> CallRecord:
    now_s = time.time()
    return CallRecord(
        call_id=call_id,
        tenant=request.tenant,
        workflow_id=request.workflow_id,
        workflow_kind=request.workflow_kind,
        node=request.node,
        role=request.role,
        kind=request.kind,
        model=request.model,
        state="refused" if failed else "finished",
        attempts=1,
        replica_id="r",
        device=None,
        prompt_key="",
        prompt_bytes=1,
        prompt_tokens=1,
        work_done=1.0,
        forecast_p50=1.0,
        forecast_p90=1.0,
        forecast_source="none",
        ready_at_s=now_s,
        dispatched_at_s=now_s,
        first_token_at_s=None,
        ended_at_s=now_s,
    )


class Client:
    """Whoever submits: it notes what it sends and what was acknowledged, and sends again what was not."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "client"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        words = [line.split() for line in lines]
        self.acknowledged = {key: id for what, key, id in words if what == "accepted"}
        sent = dict.fromkeys(key for what, key, _ in words if what == "sent")  # several times, where lives were short
        self.open = [key for key in sent if key not in self.acknowledged]

    def note(self, what: str, key: str, workflow_id: str = "-") -> None:
        with self._path.open("a") as file:
            file.write(f"{what} {key} {workflow_id}\n")


async def _live(folder: Path, life: int, rng: np.random.Generator, *, last: bool) -> None:
    store = SqliteStore(folder / "swarmx.db")
    await store.open()
    runner = WorkflowRunner(store, Script(folder, rng), WallClock())
    await runner.recover()
    client, spec = Client(folder), parse_workflow(SPEC)

    async def submit(key: str) -> None:
        client.note("sent", key)
        idempotency = Idempotency(key=key, fingerprint="f", expires_at_s=time.time() + 1e6)
        accepted = await runner.accept(spec, {}, "a", idempotency=idempotency)
        client.note("accepted", key, accepted.workflow_id)
        await asyncio.sleep(float(rng.uniform(0.0, 0.03)))
        chance = rng.random()
        if chance < _KILLED:
            await runner.kill(accepted.workflow_id, "a")
        elif chance < _KILLED + _CANCELLED:
            await runner.cancel(accepted.workflow_id, "a")
        await runner.wait(accepted.workflow_id, "a")

    new = [] if last else [f"{life}-{i}" for i in range(_PER_LIFE)]
    await asyncio.gather(*(submit(key) for key in client.open + new))
    for record in await store.unfinished():
        await runner.wait(record.workflow_id, "a")
    await runner.close()
    await store.close()


def _child(folder: Path, life: int, seed: int, *, last: bool) -> None:
    """One life, in a process of its own; half of them die by their own hand at a failpoint."""
    rng = np.random.default_rng([seed, life])
    left = int(rng.integers(1, _MOST_HITS))

    def hit(point: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            with (folder / "points").open("a") as file:
                file.write(f"{point}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    if not last and life % 2:
        failpoints.hit = hit
    asyncio.run(_live(folder, life, rng, last=last))


def _lives(folder: Path, lives: int, seed: int) -> None:
    """All lives one after the other, forked from this process, which has everything imported and no threads."""
    for life in range(lives + 1):
        last = life == lives
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(folder, life, seed, last=last)
                status = 0
            finally:
                os._exit(status)
        if not last and not life % 2:
            time.sleep(float(np.random.default_rng([seed, life, 1]).uniform(0.0, _MOST_S)))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        with (folder / "lives").open("a") as file:
            file.write("killed\n" if killed else f"ended {status}\n")


async def check(folder: Path) -> Tally:
    """Read what all lives left, and hold it against what was promised."""
    tally = Tally()
    lives = (folder / "lives").read_text().splitlines()
    tally.lives, tally.killed = len(lives) - 1, lives.count("killed")
    tally.broken += [f"a life {line}" for line in lives if line not in ("killed", "ended 0")]
    if (folder / "points").exists():
        tally.points.update((folder / "points").read_text().split())
    client = Client(folder)
    tally.broken += [f"{key} was sent and never accepted" for key in client.open]
    store = SqliteStore(folder / "swarmx.db")
    await store.open()
    try:
        made = _ledger(folder)
        tally.calls_made = sum(map(len, made.values()))
        ids = [record.workflow_id async for record in _all(store)]
        tally.workflows = len(ids)
        if sorted(ids) != sorted(client.acknowledged.values()):
            tally.broken.append(f"{len(ids)} workflows are there, {len(client.acknowledged)} keys were accepted")
        for workflow_id in ids:
            await _check_workflow(store, workflow_id, made, tally)
    finally:
        await store.close()
    return tally


async def _all(store: SqliteStore) -> AsyncIterator[WorkflowRecord]:
    cursor: str | None = None
    while True:
        page = await store.workflows(tenant="a", state=None, limit=500, cursor=cursor)
        for record in page.workflows:
            yield record
        cursor = page.next_cursor
        if cursor is None:
            return


def _ledger(folder: Path) -> dict[str, list[float]]:
    made: dict[str, list[float]] = {}
    for line in (folder / "ledger").read_text().splitlines():
        at_s, key, _ = line.split()
        made.setdefault(key, []).append(float(at_s))
    return made


async def _check_workflow(store: SqliteStore, workflow_id: str, made: dict[str, list[float]], tally: Tally) -> None:
    record = await store.workflow(workflow_id, tenant="a")
    stored = await store.events(workflow_id)
    assert record is not None
    events = [decode_event(event.body) for event in stored]
    ends = [event for event in events if isinstance(event, Finished | Failed | Cancelled)]
    tally.states[record.state] += 1
    if record.state not in TERMINAL or len(ends) != 1 or events[-1] is not ends[0]:
        tally.broken.append(f"{workflow_id} is {record.state} with {len(ends)} ends")
        return
    if ending_of(Run.rebuild(events)) != (record.state, record.outcome) or record.seq != len(events):
        tally.broken.append(f"{workflow_id}: its record is not what its events come to")
    for event, at in zip(events, stored, strict=True):
        if not isinstance(event, NodeFinished) or event.call_id is None:
            continue
        tally.calls_finished += 1
        call = await store.call(event.call_id, tenant="a")
        if call is None or call.state != "finished":
            tally.broken.append(f"{workflow_id}: the record of the finished call of {event.path} is lost")
        if max(made[f"{workflow_id}/{event.path}"]) > at.at_s + 0.001:
            tally.broken.append(f"{workflow_id}: {event.path} was called again after it had finished")


def lines_of(tally: Tally) -> Iterator[str]:
    """The tally for people."""
    yield f"{tally.lives} lives, {tally.killed} killed; {tally.workflows} workflows: {dict(tally.states)}"
    yield f"{tally.calls_made} calls made, {tally.calls_finished} of them finished a node"
    yield f"killed at failpoints: {dict(tally.points.most_common())}"
    yield from tally.broken or ["every promise was kept"]


if __name__ == "__main__":  # `python -m eval.doomed FOLDER LIVES SEED`, by `eval.durable` and the tests
    _lives(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

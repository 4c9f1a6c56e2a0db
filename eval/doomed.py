"""Short lives of a process that runs workflows, each killed at a random point; and what must be true after them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from uuid import uuid4

import numpy as np

from eval.promises import Ledger, Notes, Tally, answer_to, check
from swarmx.core import failpoints
from swarmx.core.failures import Failure
from swarmx.core.records import CallRecord, Idempotency, ModelRequest, ModelResult
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.clock import WallClock
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.spec import parse_workflow

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


class Script:
    """A caller that answers by what it is asked, fails at times, and notes each call outside the database."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self._ledger = Ledger(folder)
        self._rng = rng

    async def complete(self, request: ModelRequest) -> ModelResult:
        self._ledger.note(request.idempotency_key, request.request_id, "text", request.body)
        await asyncio.sleep(float(self._rng.uniform(0.0, 0.004)))
        call_id = f"call_{uuid4().hex}"
        failed = self._rng.random() < _FAILING and "sum_up" not in request.node and "good" not in request.node
        record = _record(request, call_id, failed=failed)
        if failed:
            failure = Failure(cause="replica", error="it broke")
            return ModelResult(call_id=call_id, replica_id=None, attempts=1, failure=failure, record=record)
        text = answer_to(request.idempotency_key)
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


async def _live(folder: Path, life: int, rng: np.random.Generator, *, last: bool) -> None:
    store = SqliteStore(folder / "swarmx.db")
    await store.open()
    runner = WorkflowRunner(store, Script(folder, rng), WallClock())
    await runner.recover()
    notes, spec = Notes(folder), parse_workflow(SPEC)

    async def submit(key: str) -> None:
        notes.note("sent", key)
        idempotency = Idempotency(key=key, fingerprint="f", expires_at_s=time.time() + 1e6)
        accepted = await runner.accept(spec, {}, "a", idempotency=idempotency)
        notes.note("accepted", key, accepted.workflow_id)
        await asyncio.sleep(float(rng.uniform(0.0, 0.03)))
        chance = rng.random()
        if chance < _KILLED:
            await runner.kill(accepted.workflow_id, "a")
        elif chance < _KILLED + _CANCELLED:
            await runner.cancel(accepted.workflow_id, "a")
        await runner.wait(accepted.workflow_id, "a")

    new = [] if last else [f"{life}-{i}" for i in range(_PER_LIFE)]
    await asyncio.gather(*(submit(key) for key in notes.open + new))
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


async def check_lives(folder: Path) -> Tally:
    """Hold what all lives left against what was promised."""
    store = SqliteStore(folder / "swarmx.db")
    await store.open()
    try:
        return await check(folder, store, tenant="a")
    finally:
        await store.close()


if __name__ == "__main__":  # `python -m eval.doomed FOLDER LIVES SEED`, by `eval.durable` and the tests
    _lives(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

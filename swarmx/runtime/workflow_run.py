"""One workflow that this process runs: takes in what happened, writes what follows, has the calls made; to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import msgspec

from swarmx.core import failpoints
from swarmx.core.errors import StoreError, SwarmXError
from swarmx.core.ports import Caller, Store
from swarmx.core.records import Blob, CallRecord, Commit, Committed, Input, WorkflowRecord, WorkflowState
from swarmx.core.toolbox import ToolSpec
from swarmx.runtime.announcer import Announcer
from swarmx.runtime.clock import Clock
from swarmx.runtime.doubtful import RETRY_S
from swarmx.runtime.inbox import Inbox
from swarmx.runtime.node_work import Answered, interrupted, plain, work_on
from swarmx.runtime.tool_catalogue import ToolCatalogue
from swarmx.runtime.workflow_inputs import CANCEL, event_of
from swarmx.workflows.events import (
    Cancelled,
    Event,
    Failed,
    Finished,
    NodeFailed,
    NodeFinished,
    NodeRetried,
    encode_event,
)
from swarmx.workflows.plan import advance, calls_in_flight, wake_at_s
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spending import Prices
from swarmx.workflows.state import Run
from swarmx.workflows.tool_names import uses_tools
from swarmx.workflows.work import NO_TOOLS, Start

log = logging.getLogger(__name__)

DEADLINE = "deadline"
_RELEASE_S = 5.0  # how long a cancelled call may take to let go before its workflow ends without it
_LONGEST_SLEEP_S = 3600.0
_GIVEN_UP = (NodeRetried, NodeFailed)


class _LostPlace(Exception):  # control flow within this module, not an error
    """Another process owns the workflow, or it has ended: this one lets it go."""


class _Left(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be stored with the events of a turn."""

    taken: tuple[int, ...] = ()
    calls: tuple[CallRecord, ...] = ()
    blobs: tuple[Blob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every workflow of a process shares. `keep` takes records of calls that no commit of a workflow carries;
    `tools` are those that nodes and agents may use, `prices` what models cost.
    """

    store: Store
    caller: Caller
    clock: Clock
    announcer: Announcer
    notify: Callable[[str], None]
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    keep: Callable[[Sequence[CallRecord]], None]
    tools: ToolCatalogue
    prices: Prices


class WorkflowRun:
    """A workflow of this process, at event `seq`. Only its own task, `drive`, changes it.

    `poke` has it look for inputs that were posted to it, and whether it still is the one who runs it. Whoever drives it
    sets `ended` once it has ended, or was let go.
    """

    def __init__(self, around: Surroundings, record: WorkflowRecord, run: Run, *, seq: int) -> None:
        self.record = record
        self.ended = asyncio.Event()
        self._around = around
        self._run = run
        self._seq = seq
        self._inbox = Inbox[Answered | None]()
        self._names_tools = uses_tools(run.graph.spec)
        self._posted = False
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._alarm: asyncio.TimerHandle | None = None

    def poke(self) -> None:
        """Something was posted to the workflow, or somebody else may have it by now."""
        self._posted = True
        self._inbox.put(None)

    async def drive(self, *, again: bool) -> None:
        """Run until the end. `again`: an earlier life began it, and calls may have been out when it ended."""
        workflow_id = self.record.workflow_id
        try:
            self._around.notify(workflow_id)
            if self._names_tools:
                await self._tools_known()
            out = self._again() if again else {}
            self._posted = self._posted or again
            await self._turn(self._inbox.drained())
            if out and not self._run.ended:
                still = calls_in_flight(self._run, self._tools())
                self._make([call for call in still if out.get(call.path) == call.attempt])
            while not self._run.ended:
                await self._turn(await self._inbox.heard())
        except _LostPlace:
            log.warning("workflow %s has ended elsewhere or is run by another process; let go", workflow_id)
        except Exception as error:
            log.exception("workflow %s ran into a defect", workflow_id)
            await give_up(self._around, self.record, self._seq, f"{type(error).__name__}: {error}")
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            for task in self._calls.values():
                task.cancel()
            self._around.keep(_records(self._inbox.drained()))

    async def _tools_known(self) -> None:
        """Wait until it is known which tools there are; a workflow that is to be cancelled need not know."""
        if self._around.tools.is_settled:
            return
        settled = asyncio.ensure_future(self._around.tools.settled())
        try:
            while not settled.done() and not await self._unwanted():
                poked = asyncio.ensure_future(self._inbox.heard())  # no call is out: there is nothing else to hear of
                await asyncio.wait({settled, poked}, return_when=asyncio.FIRST_COMPLETED)
                poked.cancel()
        finally:
            settled.cancel()

    async def _unwanted(self) -> bool:
        try:
            posted = await self._around.store.inputs(self.record.workflow_id)
        except StoreError as error:
            log.warning("what was posted to workflow %s cannot be read yet: %s", self.record.workflow_id, error)
            return False
        return any(given.body == CANCEL for given in posted)

    def _again(self) -> dict[str, int]:
        """The calls of an earlier life that are to be made again, by path, with their attempts; others have failed."""
        out: dict[str, int] = {}
        for call in calls_in_flight(self._run, self._tools()):
            lost = interrupted(call)
            if lost is None:
                out[call.path] = call.attempt
            else:
                self._inbox.put(lost)
        return out

    def _tools(self) -> Mapping[str, ToolSpec]:
        return self._around.tools.of(self.record.tenant) if self._names_tools else NO_TOOLS

    async def _turn(self, happened: list[Answered | None]) -> None:
        try:
            await self._take_in(happened)
        except BaseException:  # whatever becomes of the workflow, these calls were made
            self._around.keep(_records(happened))
            raise

    async def _take_in(self, happened: list[Answered | None]) -> None:
        run, now_s = self._run, self._around.clock.now_s()
        answers = [item for item in happened if item is not None]
        events = self._events_of(answers, now_s)
        inputs = await self._inputs() if self._posted else []
        for given in inputs:
            if (event := event_of(run, given)) is not None:
                run.apply(event)
                events.append(event)
        due_s = self.record.deadline_at_s
        if due_s is not None and now_s >= due_s and not run.ended and not run.stopping:
            events.append(Failed(error=DEADLINE))
            run.apply(events[-1])
        left = _Left(
            taken=tuple([item.number for item in inputs]),
            calls=_records(answers),
            blobs=tuple([blob for answer in answers for blob in answer.blobs]),
        )
        if run.stopping or run.ended:
            if run.cancelling and not run.ended:
                await self._commit(now_s, events, left)
                events, left = [], _Left()
            await self._release()
        following, starts = advance(run, now_s=now_s, tools=self._tools(), prices=self._around.prices)
        events += following
        await self._commit(now_s, events, left)
        self._give_up_late(events)
        self._make(starts)
        self._set_alarm(now_s)

    def _events_of(self, answers: list[Answered], now_s: float) -> list[Event]:
        """What the answers mean to their nodes; those to attempts that were given up mean nothing any more."""
        run = self._run
        events: list[Event] = []
        for answer in answers:
            node = run.nodes[answer.path]
            if run.ended or node.state != "running" or node.attempt != answer.attempt:
                continue
            self._calls.pop(answer.path, None)
            if answer.failure is None:
                event: Event = NodeFinished(
                    path=answer.path, output=answer.output, call_id=answer.call_id, spent=answer.spent
                )
            else:
                event = after_failure(
                    run, answer.path, answer.failure, now_s, call_id=answer.call_id, spent=answer.spent
                )
            run.apply(event)
            events.append(event)
        return events

    async def _inputs(self) -> list[Input]:
        """What was posted. A store that cannot read now is asked again at the alarm. Raises _LostPlace."""
        try:
            found = await self._around.store.inputs(self.record.workflow_id)
            record = await self._around.store.workflow(self.record.workflow_id, tenant=None)
        except StoreError as error:
            log.warning("what was posted to workflow %s cannot be read yet: %s", self.record.workflow_id, error)
            asyncio.get_running_loop().call_later(RETRY_S[0], self._inbox.put, None)
            return []
        if record is None or (record.owner, record.seq) != (self.record.owner, self._seq):
            raise _LostPlace
        self._posted = False
        return found

    async def _commit(self, at_s: float, events: list[Event], left: _Left) -> None:
        """Write these events with what goes with them, trying again while the store cannot. Raises _LostPlace."""
        if not (events or left.taken or left.calls or left.blobs):
            return
        state, outcome = ending_of(self._run)
        change = Commit(
            workflow_id=self.record.workflow_id,
            epoch=self.record.owner,
            expected_seq=self._seq,
            at_s=at_s,
            events=tuple(map(encode_event, events)),
            state=state,
            outcome=outcome,
            taken=left.taken,
            calls=left.calls,
            blobs=left.blobs,
        )
        failpoints.hit("run.commit")
        if await self._written(change) != "stored":
            raise _LostPlace
        failpoints.hit("run.committed")
        self._seq += len(events)
        self._around.notify(self.record.workflow_id)
        if state is not None:
            self._around.announcer.ended(self.record, state, self._around.clock.now_s())

    async def _written(self, change: Commit) -> Committed:
        attempt = 0
        while True:
            try:
                done = await self._around.store.commit(change)
                break
            except StoreError as error:
                log.warning("workflow %s waits for the store: %s", change.workflow_id, error)
                await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
        if done != "stored" and attempt:  # a write that was reported as failed may have reached the disk
            record = await self._around.store.workflow(change.workflow_id, tenant=None)
            ours = record is not None and (record.owner, record.seq) == (
                change.epoch,
                change.expected_seq + len(change.events),
            )
            return "stored" if ours else done
        return done

    def _make(self, calls: list[Start]) -> None:
        for call in calls:
            failpoints.hit("run.start")
            self._calls[call.path] = self._around.spawn(self._answer(call))

    async def _answer(self, call: Start) -> None:
        failpoints.hit("run.send")
        answered = await work_on(self._around.caller, self.record, self._run, call, self._tools(), self._around.prices)
        failpoints.hit("run.answered")
        self._inbox.put(answered)

    def _give_up_late(self, events: list[Event]) -> None:
        """Let go of the attempts that took longer than their nodes allow, or whose nodes went with others."""
        given_up = [event.path for event in events if isinstance(event, _GIVEN_UP)]
        for path in given_up:
            if path in self._calls:
                self._calls.pop(path).cancel()
        if given_up:
            for path in self._calls.keys() - self._run.in_flight.keys():
                self._calls.pop(path).cancel()

    async def _release(self) -> None:
        """Cancel the calls that are still out and give them time to let go."""
        tasks = list(self._calls.values())
        self._calls.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_RELEASE_S)

    def _set_alarm(self, now_s: float) -> None:
        """Have another turn when a rest or an attempt's time is over, or the deadline comes."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        times = [at_s for at_s in (wake_at_s(self._run), self.record.deadline_at_s) if at_s is not None]
        if times and not self._run.ended:
            left_s = min(_LONGEST_SLEEP_S, max(0.0, min(times) - now_s))
            self._alarm = asyncio.get_running_loop().call_later(left_s, self._inbox.put, None)


def _records(happened: Sequence[Answered | None]) -> tuple[CallRecord, ...]:
    return tuple([item.record for item in happened if item is not None and item.record is not None])


async def give_up(around: Surroundings, record: WorkflowRecord, seq: int, why: str) -> None:
    """End a workflow that cannot be continued."""
    workflow_id, now_s = record.workflow_id, around.clock.now_s()
    log.error("workflow %s cannot be continued: %s", workflow_id, why)
    failed = Failed(error=plain(f"the workflow cannot be continued: {why}"))
    change = Commit(
        workflow_id=workflow_id,
        epoch=record.owner,
        expected_seq=seq,
        at_s=now_s,
        events=(encode_event(failed),),
        state="failed",
        outcome=_outcome(failed),
    )
    try:
        done = await around.store.commit(change)
    except SwarmXError:
        log.exception("workflow %s could not be ended either; the next start tries again", workflow_id)
    else:
        if done == "stored":
            around.announcer.ended(record, "failed", now_s)
    around.notify(workflow_id)


def ending_of(run: Run) -> tuple[WorkflowState | None, bytes | None]:
    """The state to store and, at the end, the outcome."""
    match run.end:
        case None:
            return ("cancelling" if run.cancelling else None), None
        case Finished():
            return "finished", _outcome(run.end)
        case Failed():
            return "failed", _outcome(run.end)
        case Cancelled():
            return "cancelled", None
        case _:
            assert_never(run.end)


def _outcome(end: Finished | Failed) -> bytes:
    """The outputs, or {"error", "node"}, as JSON."""
    if isinstance(end, Finished):
        return msgspec.json.encode(end.outputs)
    return msgspec.json.encode({"error": end.error, "node": end.path})

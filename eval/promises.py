"""What must be true of workflows after any number of deaths, read from what the lives left behind."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from swarmx.core.ports import WorkflowStore
from swarmx.core.records import TERMINAL, WorkflowRecord
from swarmx.runtime.workflow_run import ending_of
from swarmx.workflows.events import Cancelled, Event, Failed, Finished, NodeFinished, NodeStarted, decode_event
from swarmx.workflows.state import Run

ONCE = "book"  # the tool whose work may not be begun twice
_CLOCK_SLACK_S = 0.001


def answer_to(key: str) -> str:
    """The one answer to an idempotency key, in every life of everybody."""
    return f"{zlib.crc32(key.encode()):08x}"


def picture_of(key: str) -> bytes:
    """The same for a call that wants an image; what follows the signature of PNG is nobody's concern here."""
    return b"\x89PNG\r\n\x1a\n" + answer_to(key).encode()


@dataclass(slots=True)
class Tally:
    """What came of all lives. `broken` says, a line each, which promise was not kept; nothing should stand there.

    An `effect` is the first call with its idempotency key, and of one of the `kinds`; `repeats` are further ones.
    """

    lives: int = 0
    killed: int = 0
    workflows: int = 0
    states: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    calls_finished: int = 0
    effects: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    repeats: int = 0
    broken: list[str] = field(default_factory=list)


class Notes:
    """The file of whoever submits: what it sent, what was acknowledged, what it saw ended, and what went wrong."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "client"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        words = [line.split(maxsplit=2) for line in lines]
        self.acknowledged = {key: value for what, key, value in words if what == "accepted"}
        self.ended = {id: state for what, id, state in words if what == "ended"}
        self.followed = {id: int(count) for what, id, count in words if what == "followed"}
        self.wrong = [f"{key} {value}" for what, key, value in words if what == "wrong"]
        self.expired = len({key for what, key, _ in words if what == "expired"})
        sent = dict.fromkeys(key for what, key, _ in words if what == "sent")  # several times, where lives were short
        self.open = [key for key in sent if key not in self.acknowledged]

    def note(self, what: str, key: str, value: str = "-") -> None:
        """`sent`, `accepted` and `expired` (it may have been forgotten by now) with a key; `ended` and `followed` with
        an id; `wrong` with either.
        """
        with self._path.open("a") as file:
            file.write(f"{what} {key} {value}\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A call as the engine saw it: of a `text`, an `image` or the tool of that name, with a hash of what was asked."""

    at_s: float
    key: str
    request_id: str
    what: str
    asked: str


class Ledger:
    """The file of whoever is called."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def close(self) -> None:
        os.close(self._file)

    def note(self, key: str, request_id: str, what: str, asked: Any) -> None:
        """A call that is about to be carried out; `asked` is JSON."""
        digest = sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()[:12]
        os.write(self._file, f"{time.time()!r} {key} {request_id} {what} {digest}\n".encode())

    @staticmethod
    def read(folder: Path) -> dict[str, list[Made]]:
        """The calls, by idempotency key."""
        made: dict[str, list[Made]] = {}
        for line in (folder / "ledger").read_text().splitlines():
            at_s, key, request_id, what, asked = line.split()
            call = Made(at_s=float(at_s), key=key, request_id=request_id, what=what, asked=asked)
            made.setdefault(key, []).append(call)
        return made


async def check(folder: Path, store: WorkflowStore, *, tenant: str, same_clock: bool = True) -> Tally:
    """Read what all lives left in the folder and the store, and hold it against what was promised.

    With `same_clock` the times of engine and events can be compared.
    """
    tally = Tally()
    lives = (folder / "lives").read_text().splitlines()
    tally.lives, tally.killed = len(lives), lives.count("killed")
    tally.broken += [f"a life {line}" for line in lives if line not in ("killed", "ended 0")]
    if (folder / "points").exists():
        tally.points.update((folder / "points").read_text().split())
    notes, made = Notes(folder), Ledger.read(folder)
    tally.broken += notes.wrong
    tally.broken += [f"{key} was sent and never accepted" for key in notes.open]
    tally.effects = len(made)
    tally.repeats = sum(map(len, made.values())) - len(made)
    for calls in made.values():
        tally.kinds[calls[0].what] += 1
    records = {record.workflow_id: record async for record in _all(store, tenant)}
    tally.workflows = len(records)
    accepted = set(notes.acknowledged.values())
    tally.broken += [f"{workflow_id} was accepted and is not there" for workflow_id in accepted - set(records)]
    if len(records) > len(accepted) + notes.expired or len(accepted) < len(notes.acknowledged):
        tally.broken.append(f"{len(records)} workflows are there, {len(notes.acknowledged)} keys were accepted")
    strangers = {key for key in made if key.split("/")[0] not in records}
    tally.broken += [f"{key} was called, and its workflow is not there" for key in strangers]
    twice = [key for key, calls in made.items() if calls[0].what == ONCE and len(calls) > 1]
    tally.broken += [f"{key} was begun twice, and may not be" for key in twice]
    torn = [key for key, calls in made.items() if len({(call.what, call.asked) for call in calls}) > 1]
    tally.broken += [f"{key} came again, and asked for something else" for key in torn]
    for record in records.values():
        await _check_workflow(store, record, _line_of(record, records), made, tally, same_clock=same_clock)
        if notes.ended.get(record.workflow_id, record.state) != record.state:
            tally.broken.append(f"{record.workflow_id} was seen {notes.ended[record.workflow_id]} before")
        seen = notes.followed.get(record.workflow_id, record.seq)
        if seen != record.seq:
            tally.broken.append(f"{record.workflow_id}: who followed it saw {seen} of its {record.seq} events")
    return tally


async def _all(store: WorkflowStore, tenant: str) -> AsyncIterator[WorkflowRecord]:
    cursor: str | None = None
    while True:
        page = await store.workflows(tenant=tenant, state=None, limit=500, cursor=cursor)
        for record in page.workflows:
            yield record
        cursor = page.next_cursor
        if cursor is None:
            return


def _line_of(record: WorkflowRecord, records: dict[str, WorkflowRecord]) -> list[str]:
    """The workflow's id, and those that it was forked from, the last first."""
    line = [record.workflow_id]
    while (old := records[line[-1]].forked_from) is not None:
        line.append(old)
    return line


async def _check_workflow(
    store: WorkflowStore,
    record: WorkflowRecord,
    line: list[str],
    made: dict[str, list[Made]],
    tally: Tally,
    *,
    same_clock: bool,
) -> None:
    workflow_id = record.workflow_id
    stored = await store.events(workflow_id)
    events = [decode_event(event.body) for event in stored]
    ends = [event for event in events if isinstance(event, Finished | Failed | Cancelled)]
    tally.states[record.state] += 1
    if record.state not in TERMINAL or len(ends) != 1 or events[-1] is not ends[0]:
        tally.broken.append(f"{workflow_id} is {record.state} with {len(ends)} ends")
        return
    if ending_of(Run.rebuild(events)) != (record.state, record.outcome) or record.seq != len(events):
        tally.broken.append(f"{workflow_id}: its record is not what its events come to")
    if await store.inputs(workflow_id):
        tally.broken.append(f"{workflow_id} has ended and inputs still wait for it")
    timed = [(event, at.at_s) for event, at in zip(events, stored, strict=True)]
    tally.broken += _unannounced(workflow_id, timed, made, same_clock=same_clock)
    for event, at_s in timed:
        if not isinstance(event, NodeFinished):
            continue
        if event.call_id is None:
            tally.broken += _other_answer(event, line, made)
            continue
        tally.calls_finished += 1
        call = await store.call(event.call_id, tenant=record.tenant)
        if call is None or call.state != "finished":
            tally.broken.append(f"{workflow_id}: the record of the finished call of {event.path} is lost")
        key = _key_of(event.path, line, made)
        if key is None:
            tally.broken.append(f"{workflow_id}: {event.path} has finished, and the engine never saw it")
            continue
        if not await _is_answer(store, event.output, key, tenant=record.tenant):
            tally.broken.append(f"{workflow_id}: {event.path} has another output than the engine's answer")
        if same_clock and max(call.at_s for call in made[key]) > at_s + _CLOCK_SLACK_S:
            tally.broken.append(f"{workflow_id}: {event.path} was called again after it had finished")


def _key_of(path: str, line: list[str], made: dict[str, list[Made]]) -> str | None:
    """The key that a call of the workflow, or of the one that it was forked from, was made with."""
    return next((key for key in (f"{id}/{path}" for id in line) if key in made), None)


async def _is_answer(store: WorkflowStore, output: Any, key: str, *, tenant: str) -> bool:
    """Whether the output of a call is what the engine answers to the key, its image there as well."""
    match output:
        case {"text": text}:
            return bool(text == answer_to(key))
        case {"images": [{"sha256": digest}]}:
            return await store.blob(digest, tenant=tenant) == ("image/png", picture_of(key))
        case _:
            return False


def _other_answer(event: NodeFinished, line: list[str], made: dict[str, list[Made]]) -> Iterator[str]:
    """An agent that has ended with something else than its model's last word."""
    match event.output:
        case {"json": {"said": said}, "steps": steps}:
            key = _key_of(f"{event.path}.{steps}", line, made)
            if key is None or said != answer_to(key):
                yield f"{line[0]}: the agent {event.path} has another answer than its model gave in step {steps}"
        case _:
            pass


def _unannounced(
    workflow_id: str, events: list[tuple[Event, float]], made: dict[str, list[Made]], *, same_clock: bool
) -> Iterator[str]:
    """Calls that the engine saw although no event had said, durably and before, that they would be made."""
    started = [(event, at_s) for event, at_s in events if isinstance(event, NodeStarted)]
    announced_s = {(event.path, event.attempt): at_s for event, at_s in started}
    for path in {event.path for event, _ in started}:
        for call in made.get(f"{workflow_id}/{path}", []):
            attempt = int(call.request_id.rpartition("/")[2].partition(".")[0])  # it may be told to several replicas
            at_s = announced_s.get((path, attempt))
            if at_s is None or (same_clock and call.at_s < at_s - _CLOCK_SLACK_S):
                yield f"{workflow_id}: attempt {attempt} at {path} was made unannounced"


def lines_of(tally: Tally) -> Iterator[str]:
    """The tally for people."""
    yield f"{tally.lives} lives, {tally.killed} killed; {tally.workflows} workflows: {dict(tally.states)}"
    yield f"{tally.effects} effects and {tally.repeats} repeats of one; {tally.calls_finished} calls finished a node"
    yield f"effects by kind: {dict(tally.kinds)}"
    yield "killed at failpoints:"
    yield from (f"  {point:<18}{count:>5}" for point, count in sorted(tally.points.items()))
    yield from tally.broken or ["every promise was kept"]

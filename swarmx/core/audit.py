"""The audit log's records: two for every control action, intent before effect, each chained to the one before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import msgspec
import numpy as np

from swarmx.core.control import Actor, Change, Effect, Evidence, Verdict, Via

GENESIS = "0" * 64
MAX_TEXT = 400
MAX_DETAIL = 2000
MAX_ARGUMENTS_BYTES = 16_384
MADE_ROOM = "audit_made_room"  # the tool of the note that says up to which `seq`, with which `hash`, records did
_MAX_DEPTH = 8
_MAX_FINDINGS = 100

Outcome = Literal["applied", "failed", "refused", "denied", "expired", "stale", "kept", "rolled_back", "interrupted"]
Damage = Literal[
    "altered",  # a record is not what was written: its content, its hash and its neighbours do not fit together
    "unreadable",  # a line is no record at all
    "missing",  # records between others are gone
    "reordered",  # a record stands after one that was written later
    "repeated",  # a record stands there a second time
    "rewritten",  # the chain fits together, but not to a head: its end was written anew
    "tail_cut",  # a head says that there were more records
    "gone",  # heads say that there were records, and there is none
    "unanchored",  # there are records but no head, so nothing shows that their end is the one that was written
    "torn",  # the last line is incomplete and under no head: a crash, or a line that is being written right now
]


class ModelUse(msgspec.Struct, frozen=True, kw_only=True):
    """The language model behind an action, with the SHA-256 of what it was asked and of what it said."""

    name: str
    prompt_sha256: str
    reply_sha256: str


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be recorded. An `intent` is written before anything happens; an `outcome` names it in `intent_seq`.

    A `note` stands alone: something worth keeping that changed nothing (a refusal, a start, a stop).
    """

    kind: Literal["intent", "outcome", "note"]
    actor: Actor
    via: Via
    tool: str
    arguments: dict[str, Any] = {}
    effect: Effect = "reversible"
    verdict: Verdict | None = None
    proposal_id: str | None = None
    changes: tuple[Change, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    model: ModelUse | None = None
    intent_seq: int | None = None
    outcome: Outcome | None = None
    detail: str = ""


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the log: the `seq`-th entry (from 1), when (Unix seconds), and the chain.

    `hash` is the SHA-256, in hex, of the canonical JSON of the record without `hash`; `prev` is the hash of the record
    before, `GENESIS` for the first.
    """

    seq: int
    at_s: float
    entry: AuditEntry
    prev: str
    hash: str


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The log up to record `seq` in one hash. Kept outside the log, it shows whether that part was written anew.

    An empty log has the head `seq` 0 with the hash `GENESIS`.
    """

    seq: int
    hash: str
    at_s: float


EMPTY = Head(seq=0, hash=GENESIS, at_s=0.0)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something in a log that is not as it was written, at or near record `seq`."""

    verdict: Damage
    seq: int
    detail: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found: at most 100 findings, in the order of the file, then what is missing and what heads say.

    The log begins behind `start`. `last` is the head of the last record that can be read, `head` the last one among
    those handed in that the log confirms. `open_intents` are intents whose outcome is not in the log.
    """

    records: int
    last: Head
    head: Head | None
    open_intents: tuple[AuditRecord, ...]
    findings: tuple[Finding, ...]
    start: Head = EMPTY

    @property
    def sound(self) -> bool:
        """Nothing was tampered with. A torn last line is a crash, which the next start repairs."""
        return all(finding.verdict == "torn" for finding in self.findings)


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    seq: int
    at_s: float
    entry: AuditEntry
    prev: str


def bounded(entry: AuditEntry) -> AuditEntry:
    """The entry as it can be kept: texts cut, what JSON does not know made plain.

    Texts are cut to MAX_TEXT characters, `detail` to MAX_DETAIL. Arguments of more than MAX_ARGUMENTS_BYTES of JSON
    leave their size, SHA-256 and beginning. Numbers that are not finite become null, lone surrogates question marks.
    """
    arguments = _plain(entry.arguments, depth=0)
    encoded = canonical(arguments)
    if len(encoded) > MAX_ARGUMENTS_BYTES:
        start = _cut(encoded.decode(), MAX_TEXT)
        arguments = {"bytes": len(encoded), "sha256": sha256(encoded).hexdigest(), "start": start}
    rest = msgspec.to_builtins(msgspec.structs.replace(entry, arguments={}, detail=""), enc_hook=np.generic.item)
    plain = _plain(rest, depth=0) | {"arguments": arguments, "detail": _cut(entry.detail, MAX_DETAIL)}
    return msgspec.convert(plain, AuditEntry)


def seal(entry: AuditEntry, *, seq: int, at_s: float, prev: str) -> AuditRecord:
    """The entry as record `seq`, chained to the record whose hash is `prev`."""
    body = _Body(seq=seq, at_s=at_s, entry=entry, prev=prev)
    return AuditRecord(seq=seq, at_s=at_s, entry=entry, prev=prev, hash=sha256(canonical(body)).hexdigest())


def canonical(value: object) -> bytes:
    """The one JSON text of a value: UTF-8, keys sorted, no spaces, shortest numbers that read back the same."""
    return msgspec.json.encode(value, order="sorted")


def line_of(record: AuditRecord) -> bytes:
    """The record as a line of the log, with its line end."""
    return canonical(record) + b"\n"


def head_of(record: AuditRecord) -> Head:
    """The head of a log whose last record this is."""
    return Head(seq=record.seq, hash=record.hash, at_s=record.at_s)


def read_line(line: bytes) -> AuditRecord | Damage:
    """The record on the line (without its line end), or what is wrong with it taken by itself."""
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return "unreadable"
    if not isinstance(fields, dict):
        return "unreadable"
    whole = canonical(fields)
    claimed = fields.pop("hash", None)
    if whole != line or claimed != sha256(canonical(fields)).hexdigest():
        return "altered"
    try:
        return msgspec.convert(fields | {"hash": claimed}, AuditRecord)
    except msgspec.ValidationError:
        return "unreadable"


def check(lines: Iterable[bytes], heads: Sequence[Head], start: Head = EMPTY) -> Report:
    """Compare a log, line by line with its line ends, with itself and with heads that were taken of it earlier.

    It goes on behind `start`: what was before has made room, which a record of the log has to say.
    """
    walk = _Walk(hashes={start.seq: start.hash}, last=start, expected=start.seq + 1)
    torn = b""
    top = max((head.seq for head in heads), default=0)
    for line in lines:
        if not line.endswith(b"\n"):
            torn = line
        else:
            walk.take(read_line(line[:-1]))
    if torn and top < walk.expected:
        walk.find("torn", walk.expected, f"the last line ends after {len(torn)} bytes, before its end")
    elif torn and isinstance(read_line(torn[:-1]), AuditRecord):
        walk.damaged("altered", "the end of this last line is another byte")
    for first, last in walk.gaps:
        walk.find("missing", first, f"records {first} to {last} are not there")
    if start.seq and (start.seq, start.hash) not in walk.made_room:
        walk.find("missing", 1, f"records 1 to {start.seq} are not there, and no record says that they made room")
    confirmed = _compare(walk, heads, top)
    return Report(
        records=walk.records,
        start=start,
        last=walk.last,
        head=confirmed,
        open_intents=tuple(walk.open_intents.values()),
        findings=tuple(walk.findings),
    )


@dataclass(slots=True, kw_only=True)
class _Walk:
    """What is known after some lines. `blurred`: the line before was no sound record, so it may have been any."""

    findings: list[Finding] = field(default_factory=list)
    hashes: dict[int, str]
    named_before: dict[int, str] = field(default_factory=dict)  # `prev` of records whose predecessor is not seen yet
    gaps: list[tuple[int, int]] = field(default_factory=list)
    open_intents: dict[int, AuditRecord] = field(default_factory=dict)
    made_room: set[tuple[object, object]] = field(default_factory=set)  # numbers and hashes up to which records did
    last: Head
    expected: int
    records: int = 0
    blurred: bool = False

    def find(self, verdict: Damage, seq: int, detail: str) -> None:
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(Finding(verdict=verdict, seq=seq, detail=detail))

    def damaged(self, verdict: Damage, detail: str) -> None:
        self.find(verdict, self.expected, detail)
        self.expected += 1
        self.blurred = True

    def take(self, record: AuditRecord | Damage) -> None:
        if record == "unreadable":
            self.damaged(record, "the line that should hold this record is no record")
        elif not isinstance(record, AuditRecord):
            self.damaged(record, "the record does not fit its own hash")
        elif record.seq in self.hashes:
            if self.hashes[record.seq] == record.hash:
                self.find("repeated", record.seq, f"the record stands again where {self.expected} should be")
            else:
                self.find("altered", record.seq, "there is a second, different record of this number")
        else:
            self._place(record)
            self._link(record)
            self._follow(record)

    def _place(self, record: AuditRecord) -> None:
        seq = record.seq
        late = self._fill_gap(seq)
        if late or (seq < self.expected and not self.blurred):
            self.find("reordered", seq, f"the record stands where {self.expected} should be")
            return
        if seq > self.expected and not self.blurred:
            self.gaps.append((self.expected, seq - 1))
        self.expected = seq + 1
        self.blurred = False

    def _fill_gap(self, seq: int) -> bool:
        for index, (first, last) in enumerate(self.gaps):
            if first <= seq <= last:
                self.gaps[index : index + 1] = [(a, b) for a, b in ((first, seq - 1), (seq + 1, last)) if a <= b]
                return True
        return False

    def _link(self, record: AuditRecord) -> None:
        seq = record.seq
        self.hashes[seq] = record.hash
        if seq - 1 in self.hashes:
            self._compare_link(seq - 1, record.prev)
        else:
            self.named_before[seq] = record.prev
        if seq + 1 in self.named_before:
            self._compare_link(seq, self.named_before.pop(seq + 1))

    def _compare_link(self, seq: int, named: str) -> None:
        if self.hashes[seq] != named:
            self.find("altered", seq, f"record {seq + 1} was chained to another record {seq}")

    def _follow(self, record: AuditRecord) -> None:
        self.records += 1
        if record.seq > self.last.seq:
            self.last = head_of(record)
        if record.entry.kind == "intent":
            self.open_intents[record.seq] = record
        elif record.entry.kind == "note" and record.entry.tool == MADE_ROOM:
            arguments = record.entry.arguments
            self.made_room.add((arguments.get("seq"), arguments.get("hash")))
        elif record.entry.kind == "outcome" and record.entry.intent_seq is not None:
            self.open_intents.pop(record.entry.intent_seq, None)


def _compare(walk: _Walk, heads: Sequence[Head], top: int) -> Head | None:
    """Hold the heads against the log; the last one that it confirms."""
    if not heads and walk.records:
        walk.find("unanchored", 1, f"there is no head of these {walk.records} records")
    known = [head for head in heads if head.seq in walk.hashes]
    confirmed = max(
        (head for head in known if walk.hashes[head.seq] == head.hash), key=lambda head: head.seq, default=None
    )
    confirmed_seq = 0 if confirmed is None else confirmed.seq
    explained = {finding.seq for finding in walk.findings if finding.verdict == "altered"}
    for head in sorted(known, key=lambda head: head.seq):
        if walk.hashes[head.seq] == head.hash or head.seq in explained:
            continue
        if head.seq <= confirmed_seq:
            walk.find(
                "altered", head.seq, f"the head of this record is wrong: that of {confirmed_seq} confirms the log"
            )
            continue
        walk.find("rewritten", head.seq, f"the log is not the one of this head; it is up to {confirmed_seq}")
        break
    # A line that is no record may be two whose line end was changed.
    if top >= walk.expected + walk.blurred:
        verdict: Damage = "tail_cut" if walk.expected > 1 else "gone"
        walk.find(verdict, walk.expected, f"the log ends before this record, a head says that there were {top}")
    return confirmed


def _plain(value: Any, *, depth: int) -> Any:
    """The value in types that JSON knows and that come back from it the same."""
    match value:
        case None | bool():
            return value
        case str():
            return _cut(value, MAX_TEXT)
        case int():
            return int(value) if -(2**63) <= value < 2**63 else _cut(hex(value), MAX_TEXT)
        case float():
            return float(value) if math.isfinite(value) else None
        case np.generic():
            return _plain(value.item(), depth=depth)
        case Mapping() | list() | tuple() if depth == _MAX_DEPTH:
            return "(deeper)"
        case Mapping():
            return {_cut(str(key), MAX_TEXT): _plain(item, depth=depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, depth=depth + 1) for item in value]
        case _:
            return _cut(str(value), MAX_TEXT)


def _cut(text: str, limit: int) -> str:
    whole = text.encode("utf-8", "replace").decode()
    return whole if len(whole) <= limit else f"{whole[:limit]}... ({len(whole) - limit} more)"

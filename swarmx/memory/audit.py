"""The audit log on disk: a file that only grows, until the next one, another with heads, one thread that writes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from swarmx.core.audit import (
    EMPTY,
    MADE_ROOM,
    AuditEntry,
    AuditRecord,
    Head,
    Report,
    bounded,
    check,
    head_of,
    line_of,
    read_line,
    seal,
)
from swarmx.core.control import Actor
from swarmx.core.errors import StoreError
from swarmx.memory.audit_files import all_lines, forget_up_to, full_files, full_name, last_head, oldest_beyond
from swarmx.memory.audit_heads import HEADS_SUFFIX, AuditHeads, read_heads
from swarmx.memory.growing_file import GrowingFile, lines_of

log = logging.getLogger(__name__)

LOG_NAME = "audit.jsonl"
MAX_TAIL = 1000
_MAX_BATCH = 256
_SYSTEM = Actor(type="system", name="swarmx", role="admin")


def read_log(path: str | Path) -> Iterator[AuditRecord]:
    """The records, first to last; an incomplete last line is left out. Raises StoreError at a damaged line."""
    for _, record in _sound_lines(Path(path)):
        yield record


def export_log(path: str | Path) -> Iterator[bytes]:
    """Like `read_log`, but the lines byte by byte, so that whoever gets them can check their hashes."""
    for line, _ in _sound_lines(Path(path)):
        yield line


def verify_files(folder: str | Path, more_heads: Sequence[Head] = ()) -> Report:
    """Check the log in a state folder against its heads, and against others that were kept elsewhere.

    Works while a server writes: heads are read before the log, so they never know more than it.
    """
    path = Path(folder) / LOG_NAME
    heads, wrong = read_heads(path.with_suffix(HEADS_SUFFIX))
    start, lines = all_lines(path)
    report = check(lines, [*heads, *more_heads], start)
    return msgspec.structs.replace(report, findings=(*report.findings, *wrong))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    entry: AuditEntry
    future: asyncio.Future[int]


class AuditLog:
    """The AuditTrail port on the file `path`; its heads go to the same name ending in `.heads`.

    A file that has `file_bytes` gets the number of its last record into its name, and another one goes on; of its heads
    the last one stays. The oldest of those files make room, and a note says so, while they have more than `keep_bytes`
    together; None: never.

    Entries that queue up share one sync to disk. A head is kept `anchor_s` seconds after a record at the latest, after
    `anchor_records` records, at the start and at the end; `on_head` hears it on the event loop that opened the log.
    `clock` gives Unix seconds.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float],
        on_head: Callable[[Head], None] | None = None,
        anchor_records: int = 100,
        anchor_s: float = 5.0,
        file_bytes: int = 64 << 20,
        keep_bytes: int | None = None,
    ) -> None:
        self._log = GrowingFile(Path(path))
        self._heads = AuditHeads(self._log.path)
        self._clock = clock
        self._on_head = on_head
        self._anchor_records = anchor_records
        self._anchor_s = anchor_s
        self._file_bytes = file_bytes
        self._keep_bytes = keep_bytes
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards what `tail` and `head` read while the thread writes
        self._recent: deque[AuditRecord] = deque(maxlen=MAX_TAIL)
        self._before = EMPTY
        self._first = 1  # the number of the first record in the file
        self._offsets = array("Q")  # where each record begins in the file
        self._end = 0  # where the last one ends
        self._head = EMPTY
        self._anchored = -1
        self._anchor_due_s: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def head(self) -> Head:
        """The head of the log as it is on disk now."""
        with self._lock:
            return self._head

    async def open(self) -> None:
        """Check the log, continue its chain, give intents without an outcome the outcome `interrupted`.

        Raises StoreError: the file cannot be opened, another process has it, or it is not as it was written.
        """
        if self._thread is not None:
            raise StoreError(f"the audit log {self._log.path} is already open")
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._start)
        except OSError as error:
            raise StoreError(
                f"the audit log {self._log.path} cannot be written: {error}; check the disk and its space"
            ) from error
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Write what is queued, keep a last head, close. Closing twice is fine."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._jobs.put(None)
            await asyncio.to_thread(thread.join)

    async def write(self, entry: AuditEntry) -> int:
        """The number of the record, once it is on disk. A cancelled wait does not undo it. Raises StoreError."""
        self._check_open()
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(entry=bounded(entry), future=future))
        return await future

    async def tail(self, *, limit: int, before: int | None = None) -> list[AuditRecord]:
        """The last `limit` records (1 to 1000) with numbers below `before`, oldest first. Raises StoreError."""
        if not 1 <= limit <= MAX_TAIL:
            raise StoreError(f"{limit} audit records were asked for, 1 to {MAX_TAIL} can be had")
        self._check_open()
        with self._lock:
            recent = list(self._recent)
            end, begin = self._head.seq + 1, self._before.seq + 1
            stop = end if before is None else max(begin, min(before, end))
            start = max(begin, stop - limit)
        if not recent or recent[0].seq <= start:
            return [record for record in recent if start <= record.seq < stop]
        return await asyncio.to_thread(self._read_back, start, stop)

    def _check_open(self) -> None:
        if self._thread is None:
            raise StoreError(f"the audit log {self._log.path} is not open, nothing can be recorded; open it first")

    def _start(self) -> None:
        try:
            self._log.open()
            self._heads.open()
            self._continue()
        except BaseException:
            self._close_files()
            raise

    def _continue(self) -> None:
        heads, wrong = read_heads(self._heads.path)
        self._before, lines = all_lines(self._log.path)
        report = check(self._scanned(lines), heads, self._before)
        for finding in (*report.findings, *wrong):
            if finding.verdict != "torn":
                raise StoreError(
                    f"the audit log {self._log.path} is not as it was written: record {finding.seq} "
                    f"{finding.verdict}, {finding.detail}; run `swarmx audit verify`, keep all its files as evidence, "
                    "and move them away to start a new log"
                )
        self._head = report.last
        self._first = report.last.seq - len(self._offsets) + 1
        self._anchored = -1 if report.head is None else report.head.seq
        entries = [_interrupted(intent) for intent in report.open_intents]
        torn_bytes = self._log.size - self._end
        if torn_bytes:
            self._log.cut(self._end)
            entries.insert(0, _repaired(torn_bytes))
        self._heads.mend()
        # A log that has records and no heads is refused, so the first head comes before the first record.
        self._anchor()
        if entries:
            self._append(entries)
            self._anchor()

    def _scanned(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """The lines of all files; remembers where they begin in the last one, and the last of them."""
        left = sum(path.stat().st_size for _, path in full_files(self._log.path, self._before))
        last: deque[bytes] = deque(maxlen=MAX_TAIL)
        self._offsets, self._end = array("Q"), 0
        self._recent.clear()
        for line in lines:
            if left > 0:
                left -= len(line)
                last.append(line)
            elif line.endswith(b"\n"):
                self._offsets.append(self._end)
                self._end += len(line)
                last.append(line)
            yield line
        self._recent.extend(record for line in last if isinstance(record := read_line(line[:-1]), AuditRecord))

    def _run(self) -> None:
        last = False
        while not last:
            batch, last = self._batch()
            if batch:
                self._settle(batch, self._write_batch([job.entry for job in batch]))
            if last or self._anchor_is_due():
                self._try_to_anchor()
        self._close_files()

    def _close_files(self) -> None:
        self._heads.close()
        self._log.close()

    def _batch(self) -> tuple[list[_Job], bool]:
        batch: list[_Job] = []
        wait_s = None if self._anchor_due_s is None else max(0.0, self._anchor_due_s - time.monotonic())
        try:
            job = self._jobs.get(timeout=wait_s)
            while job is not None:
                batch.append(job)
                if len(batch) == _MAX_BATCH:
                    return batch, False
                job = self._jobs.get_nowait()
        except Empty:
            return batch, False
        return batch, True

    def _write_batch(self, entries: list[AuditEntry]) -> int | Exception:
        """The number of the first record, or why none was written."""
        try:
            self._go_on_elsewhere()
            return self._append(entries)
        except OSError as error:
            return StoreError(
                f"the audit log {self._log.path} took no record: {error}; free some space or check the disk, then "
                "try again or restart"
            )
        except Exception as error:  # noqa: BLE001  # handed to whoever waits
            return error

    def _go_on_elsewhere(self) -> None:
        """Begin another file once this one is full, and let the oldest make room; what fails is tried again."""
        if self._log.size < self._file_bytes:
            return
        try:
            self._anchor()
            with self._lock:
                self._log.go_on(full_name(self._log.path, self._head.seq))
                self._offsets, self._end, self._first = array("Q"), 0, self._head.seq + 1
            gone = [] if self._keep_bytes is None else oldest_beyond(self._log.path, self._keep_bytes)
            if gone:
                start = last_head(gone[-1])
                self._append([_made_room(start)])
                self._anchor()
                forget_up_to(self._log.path, start)
                with self._lock:
                    self._before = start
            self._heads.thin_out(self._before)
        except (OSError, StoreError) as error:
            log.warning("the audit log %s grows beyond its size: %s", self._log.path, error)

    def _append(self, entries: Sequence[AuditEntry]) -> int:
        records: list[AuditRecord] = []
        prev, first = self._head.hash, self._head.seq + 1
        for seq, entry in enumerate(entries, start=first):
            records.append(seal(entry, seq=seq, at_s=self._clock(), prev=prev))
            prev = records[-1].hash
        lines = [line_of(record) for record in records]
        self._log.append(b"".join(lines))
        with self._lock:
            for line in lines:
                self._offsets.append(self._end)
                self._end += len(line)
            self._recent.extend(records)
            self._head = head_of(records[-1])
        if self._anchor_due_s is None:
            self._anchor_due_s = time.monotonic() + self._anchor_s
        return first

    def _settle(self, batch: list[_Job], result: int | Exception) -> None:
        def tell() -> None:
            for index, job in enumerate(batch):
                if job.future.done():
                    continue
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(result + index)

        with contextlib.suppress(RuntimeError):  # the loop that asked is gone
            self._loop.call_soon_threadsafe(tell)

    def _anchor_is_due(self) -> bool:
        if self._anchor_due_s is None:
            return False
        return time.monotonic() >= self._anchor_due_s or self._head.seq - self._anchored >= self._anchor_records

    def _try_to_anchor(self) -> None:
        try:
            self._anchor()
        except OSError as error:
            log.warning("the head of the audit log could not be kept in %s: %s", self._heads.path, error)
            self._anchor_due_s = time.monotonic() + self._anchor_s

    def _anchor(self) -> None:
        self._anchor_due_s = None
        head = self._head
        if head.seq == self._anchored:
            return
        self._heads.append(head)
        self._anchored = head.seq
        if self._on_head is not None:
            with contextlib.suppress(RuntimeError):  # the loop that opened the log is gone
                self._loop.call_soon_threadsafe(self._on_head, head)

    def _read_back(self, start: int, stop: int) -> list[AuditRecord]:
        """Records `start` up to `stop`; what made room meanwhile is left out."""
        records: list[AuditRecord] = []
        while start < stop:
            found = self._read_file(start, stop)
            records += found
            if not found:
                break
            start = found[-1].seq + 1
        return records

    def _read_file(self, start: int, stop: int) -> list[AuditRecord]:
        """Those of them that are in the same file as the first."""
        try:
            with self._lock:  # the file may not change under the read
                here = start >= self._first
                if here:
                    ends = (*self._offsets, self._end)
                    data = self._log.read(ends[start - self._first], ends[min(stop - self._first, len(self._offsets))])
        except OSError as error:
            raise StoreError(f"the audit log {self._log.path} cannot be read: {error}; check the disk") from error
        if here:
            return [self._sound(line, seq) for seq, line in enumerate(data.splitlines(), start=start)]
        for last, path in full_files(self._log.path):
            if last >= start:
                lines = list(lines_of(path))
                first = last - len(lines) + 1
                wanted = lines[start - first : stop - first]
                return [self._sound(line[:-1], seq) for seq, line in enumerate(wanted, start=start)]
        return []

    def _sound(self, line: bytes, seq: int) -> AuditRecord:
        record = read_line(line)
        if not isinstance(record, AuditRecord) or record.seq != seq:
            raise StoreError(f"record {seq} of {self._log.path} is not as it was written; run `swarmx audit verify`")
        return record


def _interrupted(intent: AuditRecord) -> AuditEntry:
    entry = intent.entry
    return AuditEntry(
        kind="outcome",
        actor=_SYSTEM,
        via="start",
        tool=entry.tool,
        effect=entry.effect,
        proposal_id=entry.proposal_id,
        intent_seq=intent.seq,
        outcome="interrupted",
        detail="SwarmX stopped before the outcome was recorded; the action may or may not have taken effect",
    )


def _repaired(torn_bytes: int) -> AuditEntry:
    detail = f"an incomplete last line of {torn_bytes} bytes, left by a crash, was cut off; nobody was told it was kept"
    return AuditEntry(kind="note", actor=_SYSTEM, via="start", tool="audit", detail=detail)


def _made_room(start: Head) -> AuditEntry:
    detail = f"the records up to {start.seq} were deleted, as state.audit_keep_mb has it"
    arguments = {"seq": start.seq, "hash": start.hash}
    return AuditEntry(kind="note", actor=_SYSTEM, via="agent", tool=MADE_ROOM, arguments=arguments, detail=detail)


def _sound_lines(path: Path) -> Iterator[tuple[bytes, AuditRecord]]:
    for number, line in enumerate(all_lines(path)[1], start=1):
        if line.endswith(b"\n"):
            record = read_line(line[:-1])
            if not isinstance(record, AuditRecord):
                raise StoreError(f"line {number} of {path} is {record}; run `swarmx audit verify` to see what happened")
            yield line, record

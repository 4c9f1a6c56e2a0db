"""The files of an audit log: the one that grows, full ones before it, and what is kept of those that made room."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec

from swarmx.core.audit import EMPTY, AuditRecord, Head, canonical, head_of, read_line
from swarmx.core.errors import StoreError
from swarmx.memory.growing_file import GrowingFile, lines_of

_START_SUFFIX = ".start"


def full_name(log: Path, last: int) -> Path:
    """Where the log's file goes once it is full, with record `last` at its end."""
    return log.with_name(f"{log.stem}-{last:012d}{log.suffix}")


def full_files(log: Path, start: Head = EMPTY) -> list[tuple[int, Path]]:
    """The full files with the number of their last record, oldest first; those that end up to `start` are leftovers."""
    found = [(int(number), path) for path in log.parent.glob(f"{log.stem}-*{log.suffix}") if (number := _number(path))]
    return sorted(item for item in found if item[0] > start.seq)


def _number(path: Path) -> str:
    number = path.stem.rpartition("-")[2]
    return number if number.isdecimal() else ""


def start_of(log: Path) -> Head:
    """The head of the last record that made room; EMPTY if none did. Raises StoreError."""
    path = log.with_suffix(_START_SUFFIX)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Head)
    except FileNotFoundError:
        return EMPTY
    except (OSError, msgspec.MsgspecError) as error:
        raise StoreError(f"{path}, which says where the audit log begins, cannot be read: {error}") from error


def all_lines(log: Path) -> tuple[Head, Iterator[bytes]]:
    """Where the log begins, and its lines, also while it is written: files that are open may be renamed or deleted.

    Raises StoreError, also while lines are read.
    """
    with ExitStack() as stack:
        try:
            while True:
                listed = full_files(log)
                files = [(last, stack.enter_context(path.open("rb"))) for last, path in listed]
                with contextlib.suppress(FileNotFoundError):
                    files.append((0, stack.enter_context(log.open("rb"))))
                if full_files(log) == listed:
                    break
        except FileNotFoundError:  # deleted between the list and the look: once more
            return all_lines(log)
        except OSError as error:
            raise StoreError(f"{log} cannot be read: {error}; check the file and its permissions") from error
        start = start_of(log)
        keep_open = stack.pop_all()

    def lines() -> Iterator[bytes]:
        with keep_open:
            for last, file in files:
                if last == 0 or last > start.seq:
                    yield from file

    return start, lines()


def oldest_beyond(log: Path, keep_bytes: int) -> list[Path]:
    """The oldest full files, so many that the others have at most that many bytes."""
    files = [path for _, path in full_files(log, start_of(log))]
    sizes = [path.stat().st_size for path in files]
    gone = 0
    while sum(sizes[gone:]) > keep_bytes:
        gone += 1
    return files[:gone]


def last_head(path: Path) -> Head:
    """The head of the last record in a full file. Raises StoreError."""
    last = b""
    for line in lines_of(path):
        last = line
    record = read_line(last[:-1])
    if not isinstance(record, AuditRecord):
        raise StoreError(f"the last record of {path} is {record}; run `swarmx audit verify`")
    return head_of(record)


def forget_up_to(log: Path, start: Head) -> None:
    """Delete the full files up to this record. A crash in between leaves files that do not count. Raises OSError."""
    kept = GrowingFile(log.with_suffix(_START_SUFFIX))
    try:
        kept.replace(canonical(start))
    finally:
        kept.close()
    for last, path in full_files(log):
        if last <= start.seq:
            path.unlink(missing_ok=True)

"""The heads of an audit log in their file, fewer of them the older they are."""

from __future__ import annotations

import logging
from bisect import bisect_left
from hashlib import sha256
from pathlib import Path

import msgspec

from swarmx.core.audit import Finding, Head, canonical
from swarmx.memory.audit_files import full_files
from swarmx.memory.growing_file import GrowingFile, lines_of

log = logging.getLogger(__name__)

HEADS_SUFFIX = ".heads"


def read_heads(path: Path) -> tuple[list[Head], list[Finding]]:
    """The heads, and what is wrong with their file. An incomplete last line is a crash and left out."""
    heads: list[Head] = []
    wrong: list[Finding] = []
    for number, line in enumerate(lines_of(path), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            heads.append(msgspec.json.decode(line, type=Head))
        except (msgspec.MsgspecError, ValueError) as error:
            seq = heads[-1].seq if heads else 0
            wrong.append(Finding(verdict="unreadable", seq=seq, detail=f"line {number} of {path.name}: {error}"))
    return heads, wrong


class AuditHeads:
    """The file with the heads of the log at `log_path`, for the process that writes it. Methods raise OSError.

    It remembers what is in the file, so that `thin_out` never takes away what somebody else wrote there.
    """

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._file = GrowingFile(log_path.with_suffix(HEADS_SUFFIX))
        self._written = sha256()

    @property
    def path(self) -> Path:
        return self._file.path

    def open(self) -> None:
        """Open or create the file. Raises StoreError."""
        self._file.open()

    def mend(self) -> None:
        """Cut off an incomplete last line. The rest was found to fit the log."""
        whole = b"".join(line for line in lines_of(self.path) if line.endswith(b"\n"))
        self._file.cut(len(whole))
        self._file.sync_folder()
        self._written = sha256(whole)

    def append(self, head: Head) -> None:
        """Returns once it is on disk."""
        line = canonical(head) + b"\n"
        self._file.append(line)
        self._written.update(line)

    def thin_out(self, start: Head) -> None:
        """Keep the last head of each full file of the log, which stands for those before it, and all heads behind them.

        The log begins behind `start`.
        """
        if sha256(self.path.read_bytes()).digest() != self._written.digest():
            log.warning("%s is not as it was written and stays as it is; run `swarmx audit verify`", self.path)
            return
        ends = [last for last, _ in full_files(self._log_path, start)]
        kept: dict[int, Head] = {}
        for head in read_heads(self.path)[0]:
            if head.seq < start.seq:
                continue
            place = bisect_left(ends, head.seq)
            kept[ends[place] if place < len(ends) else head.seq] = head
        data = b"".join(canonical(head) + b"\n" for head in kept.values())
        self._file.replace(data)
        self._written = sha256(data)

    def close(self) -> None:
        """Closing twice is fine."""
        self._file.close()

"""The files of journals: how the parts of one are named, and which ones make room for newer ones."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def part_of(first: Path, part: int) -> Path:
    """The file of this part, counted from 1, of the journal that begins in `first`."""
    return first if part == 1 else first.with_name(f"{first.stem}.{part}{first.suffix}")


def make_room(current: Path, keep_bytes: int) -> None:
    """Delete the oldest files beside `current`, which stays, until those that are left have so many bytes at most."""
    files = sorted(current.parent.glob(f"*{current.suffix}"), key=_age)
    sizes = {file: file.stat().st_size for file in files}
    for file in files:
        if sum(sizes.values()) <= keep_bytes or file == current:
            return
        file.unlink(missing_ok=True)
        log.info("the journal %s made room for newer ones", file.name)
        del sizes[file]


def _age(file: Path) -> tuple[str, int]:
    """Names begin with the time at which the process did."""
    began, _, part = file.stem.partition(".")
    return began, int(part) if part.isdecimal() else 1

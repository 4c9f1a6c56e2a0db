"""Bounds and measures all processes of a sandbox together, in control groups, where this process may make them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_PREFIX = "swarmx-tools"


class ControlGroup:
    """One group, with a folder for each hierarchy that it is in (one in version 2, one a controller in version 1).

    Processes join by writing 0 to the files of `join`. Raises OSError where it cannot be made.
    """

    def __init__(self, parents: Sequence[Path], name: str, *, memory_bytes: int, processes: int) -> None:
        self._folders = [parent / f"{_PREFIX}-{name}" for parent in parents]
        try:
            for folder in self._folders:
                folder.mkdir(exist_ok=True)
                _limit(folder, memory_bytes=memory_bytes, processes=processes)
        except OSError:
            self.remove()
            raise
        self._before_s = self._counted_s()  # one that could not be taken away is used again

    def cpu_s(self) -> float:
        """What its processes have computed since it was made; 0 where that is not counted."""
        return self._counted_s() - self._before_s

    @property
    def join(self) -> list[str]:
        """The files that take the process that joins."""
        return [str(folder / "cgroup.procs") for folder in self._folders]

    def remove(self) -> None:
        """Take the empty group away."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _counted_s(self) -> float:
        for folder in self._folders:
            with contextlib.suppress(OSError, ValueError, IndexError):
                if (folder / "cpuacct.usage").exists():
                    return int((folder / "cpuacct.usage").read_text()) * 1e-9
                return int((folder / "cpu.stat").read_text().split()[1]) * 1e-6
        return 0.0


def parents(*, mount: Path = _MOUNT, process: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Where groups that bound memory and processes can be made; nothing where they cannot.

    Version 1: below the groups of this process. Version 2: in its group or the one around it, whichever hands the two
    controllers on (a delegated unit of systemd, for example).
    """
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return []
    paths = {controller: path for _, names, path in lines for controller in names.split(",")}
    first = [mount / name / paths[name].lstrip("/") for name in ("memory", "pids", "cpuacct") if name in paths]
    if "memory" in paths and "pids" in paths:
        return first if all(_writable(folder) for folder in first) else []
    own = mount / paths.get("", "/").lstrip("/")
    for folder in (own, own.parent):
        control = folder / "cgroup.subtree_control"
        with contextlib.suppress(OSError):
            if {"memory", "pids"} <= set(control.read_text().split()) and _writable(folder):
                return [folder]
    return []


def sweep(folders: Sequence[Path]) -> None:
    """Take away what replicas left that were killed: groups carry the pid of who made them."""
    for parent in folders:
        for folder in parent.glob(f"{_PREFIX}-*-*"):
            if not Path(f"/proc/{folder.name.split('-')[2]}").exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and (folder / "cgroup.procs").exists()


def _limit(folder: Path, *, memory_bytes: int, processes: int) -> None:
    if (folder / "pids.max").exists():
        (folder / "pids.max").write_text(str(processes))
    if (folder / "memory.max").exists():
        (folder / "memory.max").write_text(str(memory_bytes))
        with contextlib.suppress(OSError):  # there is no swap
            (folder / "memory.swap.max").write_text("0")
    if (folder / "memory.limit_in_bytes").exists():
        (folder / "memory.limit_in_bytes").write_text(str(memory_bytes))

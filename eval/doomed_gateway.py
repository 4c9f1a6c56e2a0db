"""Whole gateways that die on order: a process that has everything imported forks one for each life.

`python -m eval.doomed_gateway` reads a `Doom` a line and answers with the pid, then with the wait status.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from swarmx import serve
from swarmx.core import failpoints

_PR_SET_PDEATHSIG = 1
_CALL = re.compile(r'failpoints\.hit\("([a-z._]+)"\)')


class Doom(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a gateway, and how it is to end.

    It dies at its `hits`-th hit of `point`, or of any point; without `hits`, when somebody kills it. Its system clock
    is wrong by `clock_s`, and by `jump_s` more from `jump_after_s` on.
    """

    config: str
    state_dir: str
    port: int
    folder: str
    hits: int | None = None
    point: str | None = None
    clock_s: float = 0.0
    jump_s: float = 0.0
    jump_after_s: float = 0.0


def points() -> list[str]:
    """Every failpoint that a gateway on SQLite can come to, as the source names them."""
    root = Path(serve.__file__).parent
    files = [path for path in root.rglob("*.py") if "postgres" not in path.parts]
    return sorted({point for path in files for point in _CALL.findall(path.read_text())})


def _arm(doom: Doom) -> None:
    left = doom.hits
    lock = threading.Lock()  # the loop and the writer of the store come to points at once

    def hit(point: str) -> None:
        nonlocal left
        if left is None or doom.point not in (None, point):
            return
        with lock:
            left -= 1
            if left == 0:
                with (Path(doom.folder) / "points").open("a") as file:
                    file.write(f"{point}\n")
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.hit = hit


def _bend_time(doom: Doom) -> None:
    right, begun_s = time.time, time.monotonic()

    def wrong() -> float:
        jumped = time.monotonic() - begun_s >= doom.jump_after_s
        return right() + doom.clock_s + (doom.jump_s if jumped else 0.0)

    time.time = wrong


def _live(doom: Doom) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(Path(doom.folder) / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _arm(doom)
    _bend_time(doom)
    serve.serve(
        config=Path(doom.config),
        state_dir=Path(doom.state_dir),
        emulated=False,
        port=doom.port,
        on=None,
        coordinator=None,
        exit_with_parent=False,
    )


def main() -> None:
    """Fork until standard input ends."""
    for line in sys.stdin:
        doom = msgspec.json.decode(line, type=Doom)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _live(doom)
                status = 0
            except BaseException as error:  # noqa: BLE001  # this is the end of a process; its log says why
                print(f"the life ended with {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()

"""Stands in for `python main.py ... --port PORT`: a ComfyUI server on another port, and a front of SwarmX on this one.

ComfyUI's own tests start their server so. Reads COMFYUI_PYTHON (its interpreter) and SWARMX (our command) from the
environment; ends with whoever started it, and both servers with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Called in the child: the kernel kills it when its parent is gone, however that ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_answered(url: str, process: subprocess.Popen[bytes], within_s: float = 300.0) -> None:
    """Until the URL answers 200. Raises RuntimeError when the process ends first, or it takes too long."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise RuntimeError(f"the process behind {url} ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2.0) as response:  # noqa: S310  # our own loopback URL
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"nothing answered at {url} within {within_s:g} s")


def for_comfyui() -> dict[str, str]:
    """What the environment of ComfyUI's interpreter needs; see torchvision_on_cpu."""
    folders = [str(Path(__file__).with_name("torchvision_on_cpu")), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def start_server(arguments: list[str], port: int, folder: Path, comfyui: Path) -> subprocess.Popen[bytes]:
    """A real server; the page that it would serve is an empty one."""
    page = folder / "page"
    page.mkdir(parents=True, exist_ok=True)
    (page / "index.html").write_text("<html></html>")
    own = ("--port", str(port), "--front-end-root", str(page), "--disable-api-nodes")
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(
            [os.environ["COMFYUI_PYTHON"], "main.py", *arguments, *own],
            cwd=comfyui,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **for_comfyui(), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            preexec_fn=die_with_parent,
        )


def start_front(port: int, servers: list[int], folder: Path) -> subprocess.Popen[bytes]:
    """A front without keys over servers on these ports."""
    named = [f"--server=s{n + 1}=http://127.0.0.1:{server}" for n, server in enumerate(servers)]
    command = [os.environ["SWARMX"], "--state-dir", str(folder / "state"), "comfy", "--no-auth", "--port", str(port)]
    with (folder / "front.log").open("wb") as log:
        return subprocess.Popen(
            [*command, *named],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )


def forward(port: int, inner: int, ready: threading.Event) -> None:
    """Take connections at once and serve them once there is a front: whoever waits is not refused meanwhile."""
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    while True:
        outer, _ = listener.accept()
        threading.Thread(target=_joined, args=(outer, inner, ready), daemon=True).start()


def _joined(outer: socket.socket, inner: int, ready: threading.Event) -> None:
    ready.wait()
    other = socket.create_connection(("127.0.0.1", inner))
    threading.Thread(target=_pump, args=(other, outer), daemon=True).start()
    _pump(outer, other)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def main() -> None:
    arguments = sys.argv[2:]  # main.py is the first
    where = arguments.index("--port")
    port = int(arguments[where + 1])
    del arguments[where : where + 2]
    die_with_parent()
    folder, behind = Path(tempfile.mkdtemp(prefix="behind-front-")), free_port()
    inner = free_port()
    ready = threading.Event()
    threading.Thread(target=forward, args=(port, inner, ready), daemon=True).start()
    server = start_server(arguments, behind, folder, Path.cwd())
    until_answered(f"http://127.0.0.1:{behind}/queue", server)
    front = start_front(inner, [behind], folder)
    until_answered(f"http://127.0.0.1:{inner}/readyz", front)
    ready.set()
    front.wait()


if __name__ == "__main__":
    main()

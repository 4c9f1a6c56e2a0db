"""What the tests of tools share: whether there is a sandbox, tools to call, and looks at processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.toolbox import ToolCall
from swarmx.providers.tools.profile import HOSTNAME
from tests.e2e.fleet import children


@cache
def sandboxed() -> bool:
    """Whether bubblewrap can make a sandbox here at all."""
    if shutil.which("bwrap") is None:
        return False
    probe = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "/bin/true"]
    return subprocess.run(probe, capture_output=True).returncode == 0


needs_sandbox = pytest.mark.skipif(not sandboxed(), reason="there is no bubblewrap: run `make sandbox`")


def a_call(tool: str, *, tenant: str = "acme", deadline_at_s: float | None = None, **arguments: Any) -> ToolCall:
    return ToolCall(
        tool=tool, arguments=arguments, key="wf/n", request_id="wf/n/1", tenant=tenant, deadline_at_s=deadline_at_s
    )


def running(marker: str) -> list[int]:
    """Pids of all processes on this host that have the marker in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line:
                found.append(int(entry.name))
    return found


def under_way() -> int:
    """How many sandboxes this process has started that are not over."""
    return sum(HOSTNAME in command for command in children(os.getpid()).values())


async def until(holds: Callable[[], bool] | Callable[[], Awaitable[bool]], *, deadline_s: float = 60.0) -> None:
    """Wait until it holds; AssertionError when it never does."""
    end_s = time.monotonic() + deadline_s
    while True:
        answer = holds()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < end_s, "it never came to hold"
        await asyncio.sleep(0.01)

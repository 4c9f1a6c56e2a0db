"""Processes that serve leave what they have had since their start to no garbage collection."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LEFT = """
import gc, weakref
from swarmx.runtime.garbage import {leave}
class Node: pass
garbage, kept = Node(), Node()
garbage.cycle, kept.cycle = garbage, kept
gone = weakref.ref(garbage)
gc.disable()
del garbage
{before}
{leave}()
print(gone() is None, any(one is kept for one in gc.get_objects()))
"""


def left(leave: str, before: str = "") -> list[str]:
    """Whether garbage from before is gone, and whether what was kept is looked at again."""
    script = LEFT.format(leave=leave, before=before)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_what_is_here_is_collected_once_and_not_looked_at_again() -> None:
    assert left("leave_what_is_here") == ["True", "False"]


@pytest.mark.parametrize(("before", "found"), [("", ["False", "True"]), ("gc.freeze()", ["False", "False"])])
def test_a_process_of_somebody_else_is_left_as_it_is_unless_its_owner_did_the_same(
    before: str, found: list[str]
) -> None:
    assert left("leave_what_is_here_too", before) == found


# The command itself, and at its end whether the compiler is loaded and its objects are looked at.
SERVING = """
import atexit, gc, sys
def tell():
    compiler = vars(sys.modules["numba"])
    print(any(one is compiler for one in gc.get_objects()), file=sys.stderr)
atexit.register(tell)
from swarmx.cli import main
main()
"""


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [["up", "--emulated", "--port", "0"], ["comfy", "--no-auth", "--server", "http://127.0.0.1:9", "--port", "0"]],
    ids=lambda command: command[0],
)
def test_a_server_has_loaded_the_compiler_before_it_serves_and_leaves_it_alone(
    tmp_path: Path, command: list[str]
) -> None:
    line = [sys.executable, "-c", SERVING, "--state-dir", str(tmp_path), *command]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["url"]
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert told.splitlines()[-1] == "False", told

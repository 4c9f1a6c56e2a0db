"""Loops that are compiled: once, before the first decision, wherever SwarmX is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
import pytest

from swarmx.agents.compiled import compiled


def halved(numbers: Any) -> float:
    return float(numbers[0] / numbers[1])


PARTS = 2.0


def parted(numbers: Any) -> float:
    return float(numbers[0] / PARTS)


def checked(numbers: Any) -> float:
    if len(numbers) == 0:
        raise IndexError
    return float(numbers[0])


SIGNATURE = "float64(Array(float64, 1, 'A', readonly=True))"
EXAMPLE = np.ones(2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_compiled_is_kept_for_the_next_process(cache: Path) -> None:
    assert compiled(halved, SIGNATURE, EXAMPLE)(np.array([3.0, 2.0])) == 1.5
    assert files_in(cache)


def test_what_was_kept_and_is_broken_is_made_anew(cache: Path) -> None:
    compiled(halved, SIGNATURE, EXAMPLE)
    for path in files_in(cache):
        path.write_bytes(b"broken")
    assert compiled(halved, SIGNATURE, EXAMPLE)(np.array([3.0, 2.0])) == 1.5


def test_what_was_kept_with_another_constant_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.array([3.0])
    assert compiled(parted, SIGNATURE, EXAMPLE)(numbers) == 1.5
    monkeypatch.setitem(globals(), "PARTS", 4.0)
    assert compiled(parted, SIGNATURE, EXAMPLE)(numbers) == 0.75


def test_what_cannot_be_kept_works_all_the_same() -> None:
    nowhere = FunctionType(halved.__code__.replace(co_filename="<nowhere>"), globals())
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(nowhere)
    assert compiled(nowhere, SIGNATURE, EXAMPLE)(np.array([3.0, 2.0])) == 1.5


def test_a_division_by_zero_is_that_of_arrays() -> None:
    assert compiled(halved, SIGNATURE, EXAMPLE)(np.array([3.0, 0.0])) == np.inf


def test_it_was_called_with_the_example_before_it_is_given_out() -> None:
    with pytest.raises(IndexError):
        compiled(checked, SIGNATURE, np.zeros(0))
    assert compiled(checked, SIGNATURE, np.ones(1))(np.ones(1)) == 1.0


@pytest.mark.parametrize("layout", ["C", "F"])
def test_tables_may_lie_in_either_order_and_be_read_only(layout: Any) -> None:
    row = np.array([[3.0, 9.0], [2.0, 9.0]], order=layout)[:, 0]
    row.flags.writeable = False
    assert compiled(halved, SIGNATURE, EXAMPLE)(row) == 1.5


WHEN = """
import sys
import swarmx.cli, swarmx.agents.policies
from swarmx.agents.policies.marginal_cost import weigh
from swarmx.agents.pool_columns import as_of, dispatched
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
assert "numba" not in sys.modules, "a command that decides nothing has loaded it"
RouterAgent(RouterSettings(models=("m",)))
assert [made.cache_info().currsize for made in (weigh, as_of, dispatched)] == [1, 1, 1]
"""


def test_only_a_router_loads_the_compiler_and_it_does_so_when_it_is_made() -> None:
    done = subprocess.run([sys.executable, "-c", WHEN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


FIRST = """
import sys
from tests.agents.routers import a_router, placed
from tests.agents.worlds import ready

def decided(call_id):
    ran = set()
    sys.setprofile(lambda frame, event, argument: ran.add((frame.f_globals.get("__name__", ""), frame.f_code.co_name)))
    outputs = agent.handle(ready(call_id), 1.0)
    sys.setprofile(None)
    assert placed(outputs) and ("swarmx.agents.policies.marginal", "choose") in ran
    return {(module, name) for module, name in ran if module.partition(".")[0] == "numba"}

agent = a_router("r0", "r1", policy="marginal", shared=sys.argv[1] == "shared")
first, second = decided("a"), decided("b")
assert first <= second, f"the compiler had something left to find out: {first - second}"
"""


@pytest.mark.parametrize("replicas", ["own", "shared"])
def test_the_first_decision_of_a_process_finds_everything_compiled_and_called(replicas: str) -> None:
    command = [sys.executable, "-c", FIRST, replicas]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr

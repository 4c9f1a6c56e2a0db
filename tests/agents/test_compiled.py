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


SIGNATURE = "float64(Array(float64, 1, 'A', readonly=True))"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_compiled_is_kept_for_the_next_process(cache: Path) -> None:
    assert compiled(halved, SIGNATURE)(np.array([3.0, 2.0])) == 1.5
    assert files_in(cache)


def test_what_was_kept_and_is_broken_is_made_anew(cache: Path) -> None:
    compiled(halved, SIGNATURE)
    for path in files_in(cache):
        path.write_bytes(b"broken")
    assert compiled(halved, SIGNATURE)(np.array([3.0, 2.0])) == 1.5


def test_what_was_kept_with_another_constant_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.array([3.0])
    assert compiled(parted, SIGNATURE)(numbers) == 1.5
    monkeypatch.setitem(globals(), "PARTS", 4.0)
    assert compiled(parted, SIGNATURE)(numbers) == 0.75


def test_what_cannot_be_kept_works_all_the_same() -> None:
    nowhere = FunctionType(halved.__code__.replace(co_filename="<nowhere>"), globals())
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(nowhere)
    assert compiled(nowhere, SIGNATURE)(np.array([3.0, 2.0])) == 1.5


def test_a_division_by_zero_is_that_of_arrays() -> None:
    assert compiled(halved, SIGNATURE)(np.array([3.0, 0.0])) == np.inf


@pytest.mark.parametrize("layout", ["C", "F"])
def test_tables_may_lie_in_either_order_and_be_read_only(layout: Any) -> None:
    row = np.array([[3.0, 9.0], [2.0, 9.0]], order=layout)[:, 0]
    row.flags.writeable = False
    assert compiled(halved, SIGNATURE)(row) == 1.5


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

"""What the command line prints of a workflow."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from swarmx.tables import print_program, print_remaining


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), markup=False, emoji=False, width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_program(**more: Any) -> dict[str, Any]:
    nothing = {"source": "codex", "parent_id": None, "subagents": [], "tools": {}, "gaps_s": 0.0, "ended_by": None}
    return {**nothing, **more}


def test_a_program_shows_its_family_and_its_tools(console: Console) -> None:
    print_program(
        console, a_program(parent_id="red:p", subagents=["red:c", "red:d"], tools={"read": 1, "grep": 3}, gaps_s=12.34)
    )
    assert printed(console) == (
        "Known from headers of codex, started by red:p, started red:c, started red:d.\n"
        "Tools asked for: grep 3, read 1; 12.3 s of waiting for them.\n"
    )


def test_a_program_of_an_earlier_version_shows_what_is_known(console: Console) -> None:
    print_program(console, a_program(source=None))
    assert printed(console) == "Known from headers.\n"


@pytest.mark.parametrize("waits", [True, False])
def test_the_pause_for_tools_is_shown_where_there_is_one(console: Console, waits: bool) -> None:
    forecast = {"levels": [0.5, 0.9], "quantiles": [2.0, 7.0]}
    pause = forecast if waits else None
    print_remaining(console, {"calls": forecast, "work": forecast, "path": forecast, "pause": pause})
    assert ("2 s until its tools are back (P90 7)" in printed(console)) == waits

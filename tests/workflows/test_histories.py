"""What earlier versions stored is read by this one, and comes to the same state: the promise to every database."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.workflows.events import EVENTS_VERSION, Event, NodeFinished, SignalReceived, decode_event
from swarmx.workflows.plan import advance, wake_at_s
from swarmx.workflows.state import Run
from tests.workflows.histories.record import FOLDER, KNOWN, SCENARIOS, answer, state_of

HISTORIES = sorted(FOLDER.glob("v*/*.jsonl"))


def read(path: Path) -> tuple[list[Event], dict[str, Any]]:
    *events, last = path.read_bytes().splitlines()
    return [decode_event(event) for event in events], msgspec.json.decode(last)["state"]


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_history_comes_to_the_state_in_which_it_was_recorded(path: Path) -> None:
    events, state = read(path)
    found = state_of(Run.rebuild(events))
    assert {name: found[name] for name in state} == state  # an earlier version knew less of a state


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_history_goes_on_to_its_end(path: Path) -> None:
    events, _ = read(path)
    run, now_s = Run.rebuild(events), 0.0
    advance(run, now_s=now_s, tools=KNOWN)
    while not run.ended:
        happened: list[Event] = [NodeFinished(path=path, output=answer(path)) for path in list(run.in_flight)[:1]]
        if not happened:  # nothing is out: something rests, or waits for a signal
            now_s = max(now_s, wake_at_s(run) or 0.0)
            happened = [SignalReceived(name=name, value={"ok": True}) for name in list(run.awaited)[:1]]
        assert advance(run, happened, now_s=now_s, tools=KNOWN) != ([], []), "it does not come to a halt"


def test_every_version_has_its_histories() -> None:
    counts = Counter(path.parent.name for path in HISTORIES)
    assert counts == {"v1": 16, "v2": 23, f"v{EVENTS_VERSION}": len(SCENARIOS)}

"""The same misbehaving world through both shells: the same rules hold, and the journals reproduce."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.actions import Dispatch
from swarmx.core.errors import JournalError
from swarmx.core.messages import AlertRaised, Envelope
from swarmx.runtime.journal import VERSION, Entry, FileJournal, MemoryJournal, read, replay
from tests.agents.worlds import IMPATIENT, Referee, ready, run_live, run_virtual

Run = Callable[..., Referee]
SHELLS = pytest.mark.parametrize("run", [run_virtual, run_live], ids=["virtual", "live"])
AGENTS = {"router": msgspec.to_builtins(IMPATIENT)}


def a_journal(path: Path, run: Run = run_virtual, seed: int = 1) -> Path:
    journal = FileJournal(path / "a.jsonl", AGENTS)
    run(seed, journal)
    journal.close()
    return journal.path


@SHELLS
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), late_binding=st.booleans())
def test_whatever_the_world_does_every_call_ends_exactly_once(run: Run, seed: int, late_binding: bool) -> None:
    run(seed, MemoryJournal(limit=0), late_binding=late_binding).check_settled()


@SHELLS
@pytest.mark.parametrize("seed", range(3))
def test_calls_wait_for_full_replicas_only_with_late_binding(run: Run, seed: int) -> None:
    assert run(seed, MemoryJournal(limit=0)).most_waiting > 10
    assert run(seed, MemoryJournal(limit=0), late_binding=False).most_waiting == 0


@SHELLS
@pytest.mark.parametrize("seed", range(5))
def test_a_journal_reproduces_its_decisions(run: Run, seed: int, tmp_path: Path) -> None:
    found = replay(a_journal(tmp_path, run, seed))
    assert found.divergence is None
    assert found.decisions > 30
    assert found.steps > found.decisions


@pytest.mark.parametrize("seed", range(10))
def test_both_shells_decide_alike(seed: int) -> None:
    def decided(run: Run) -> list[Dispatch]:
        journal = MemoryJournal()
        run(seed, journal)
        return [o for entry in journal.entries for o in entry.answered if isinstance(o, Dispatch)]

    assert decided(run_virtual) == decided(run_live)


def test_a_journal_that_was_tampered_with_is_found_out_at_that_step(tmp_path: Path) -> None:
    path = a_journal(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    step = next(i for i, line in enumerate(lines) if b'"type":"Dispatch"' in line)
    entry = msgspec.json.decode(lines[step])
    entry["answered"][0]["replica_id"] = "elsewhere"
    lines[step] = msgspec.json.encode(entry) + b"\n"
    path.write_bytes(b"".join(lines))
    divergence = replay(path).divergence
    assert divergence is not None
    assert divergence.step == step
    assert divergence.replayed != divergence.entry.answered


def test_a_journal_with_a_line_cut_out_is_found_out(tmp_path: Path) -> None:
    path = a_journal(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[next(i for i, line in enumerate(lines) if b'"type":"CallReady"' in line)]
    path.write_bytes(b"".join(lines))
    assert replay(path).divergence is not None


def test_a_last_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    path = a_journal(tmp_path)
    whole = replay(path)
    path.write_bytes(path.read_bytes()[:-20])
    cut = replay(path)
    assert cut.divergence is None
    assert cut.steps == whole.steps - 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not begin with a journal header"),
        (b"hello\n", "does not begin with a journal header"),
        (b'{"format":"other","version":1,"agents":{}}\n', "this swarmx reads"),
        (b'{"format":"swarmx-journal","version":99,"agents":{}}\n', "written by another version"),
        (b'{"format":"swarmx-journal","version":%d,"agents":{"prefetch":{}}}\n' % VERSION, "does not know: prefetch"),
        (b'{"format":"swarmx-journal","version":%d,"agents":{}}\n{}\n' % VERSION, "line 2: not a journal entry"),
    ],
    ids=["empty", "text", "other format", "newer", "other agents", "other lines"],
)
def test_a_file_that_is_no_journal_is_refused_with_its_reason(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match=says):
        replay(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot read the journal"):
        replay(tmp_path / "nowhere.jsonl")


def test_a_step_of_an_agent_that_the_header_does_not_name_is_refused(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.jsonl", {})
    envelope = Envelope(sender="world", epoch=1, seq=1, message=AlertRaised(kind="policy_failed", subject="x"))
    journal.write(Entry(at_s=0.0, agent="ghost", heard=envelope, answered=[]))
    journal.close()
    with pytest.raises(JournalError, match="'ghost' is missing from the header"):
        replay(journal.path)


class Moody:
    """Fails on every second call, after it has counted it."""

    name = "moody"
    listens: frozenset[type] = frozenset()
    actions: frozenset[type] = frozenset()

    def __init__(self, config: dict[str, Any]) -> None:
        self.heard = 0

    def handle(self, message: Any, now_s: float) -> list[Any]:
        self.heard += 1
        if self.heard % 2:
            raise RuntimeError("not now")
        return [AlertRaised(kind="policy_failed", subject="moody", value=float(self.heard))]


def test_a_step_at_which_an_agent_failed_is_replayed_as_well(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.jsonl", {"moody": {}})
    for seq in range(1, 5):
        raised = "RuntimeError" if seq % 2 else None
        said = [] if seq % 2 else [AlertRaised(kind="policy_failed", subject="moody", value=float(seq))]
        heard = Envelope(sender="world", epoch=1, seq=seq, message=ready(f"c{seq}"))
        journal.write(Entry(at_s=0.0, agent="moody", heard=heard, answered=list(said), raised=raised))
    journal.close()
    assert replay(journal.path, {"moody": Moody}).divergence is None


def test_the_header_of_a_journal_holds_the_settings_of_its_agents(tmp_path: Path) -> None:
    header, entries = read(a_journal(tmp_path))
    assert header.agents == AGENTS
    assert all(entry.agent == "router" for entry in entries)

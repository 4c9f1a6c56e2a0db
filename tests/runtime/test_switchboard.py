from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from swarmx.core.actions import Dispatch, StartTimer
from swarmx.core.messages import AlertRaised, CallCancelled, Message, TimerFired
from swarmx.core.ports import Output
from swarmx.runtime.journal import Entry, MemoryJournal
from swarmx.runtime.switchboard import Command, Switchboard

HELLO = CallCancelled(call_id="c")
TEA = StartTimer(key="tea", at_s=1.0)


class Scripted:
    """An agent that answers what its script says."""

    def __init__(self, name: str, script: Callable[[Message], Sequence[Any]], *listens: type) -> None:
        self.name = name
        self.listens = frozenset(listens or (CallCancelled,))
        self.actions: frozenset[type] = frozenset({StartTimer})
        self.heard: list[Message] = []
        self._script = script

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        self.heard.append(message)
        return self._script(message)


def alert(subject: str) -> AlertRaised:
    return AlertRaised(kind="policy_failed", subject=subject)


def raises(message: Message) -> Sequence[Output]:
    raise RuntimeError("no")


def board(*agents: Scripted) -> tuple[Switchboard, MemoryJournal]:
    journal = MemoryJournal()
    return Switchboard(agents, epoch=4, journal=journal), journal


def test_a_message_reaches_its_listeners_in_the_order_of_the_agents() -> None:
    order: list[str] = []
    agents = [Scripted(name, lambda m, name=name: order.append(name) or (), CallCancelled) for name in "bac"]  # type: ignore[misc]
    deaf = Scripted("deaf", lambda m: order.append("deaf") or (), TimerFired)  # type: ignore[func-returns-value]
    switchboard, _ = board(*agents, deaf)
    switchboard.deliver(HELLO, 0.0)
    assert order == ["b", "a", "c"]


def test_what_an_agent_says_is_delivered_after_what_was_said_before() -> None:
    first = Scripted("first", lambda m: [alert("x"), alert("y")])
    second = Scripted("second", lambda m: [alert("z")] if m == HELLO else [], CallCancelled, AlertRaised)
    switchboard, _ = board(first, second)
    switchboard.deliver(HELLO, 0.0)
    assert second.heard == [HELLO, alert("x"), alert("y"), alert("z")]


def test_every_step_is_journaled_with_the_cause_of_what_was_heard() -> None:
    first = Scripted("first", lambda m: [alert("x")])
    second = Scripted("second", lambda m: [TEA], AlertRaised)
    switchboard, journal = board(first, second)
    commands = switchboard.deliver(HELLO, 2.5, cause="other/1/9")
    heard = [(entry.agent, entry.at_s, entry.heard.ref, entry.heard.cause) for entry in journal.entries]
    assert heard == [("first", 2.5, "world/4/1", "other/1/9"), ("second", 2.5, "first/4/1", "world/4/1")]
    assert commands == [Command(agent="second", action=TEA)]


def test_messages_of_a_sender_are_numbered_from_one_on() -> None:
    switchboard, journal = board(Scripted("a", lambda m: []))
    for _ in range(3):
        switchboard.deliver(HELLO, 0.0)
    assert [entry.heard.seq for entry in journal.entries] == [1, 2, 3]


def test_a_message_to_one_agent_reaches_nobody_else() -> None:
    a, b = Scripted("a", lambda m: []), Scripted("b", lambda m: [])
    switchboard, _ = board(a, b)
    switchboard.deliver(TimerFired(key="k"), 0.0, to="b")
    assert (a.heard, b.heard) == ([], [TimerFired(key="k")])


def test_an_agent_that_raises_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    switchboard, journal = board(Scripted("bad", raises), Scripted("good", lambda m: [TEA]))
    assert switchboard.deliver(HELLO, 0.0) == [Command(agent="good", action=TEA)]
    assert switchboard.faults == 1
    assert [(entry.agent, entry.raised) for entry in journal.entries] == [("bad", "RuntimeError"), ("good", None)]
    assert "agent bad failed on CallCancelled" in caplog.text


def test_an_action_outside_the_set_of_its_agent_is_dropped_and_counted() -> None:
    stray = Dispatch(call_id="c", attempt=1, replica_id="r")
    switchboard, journal = board(Scripted("a", lambda m: [stray, TEA]))
    assert switchboard.deliver(HELLO, 0.0) == [Command(agent="a", action=TEA)]
    assert switchboard.faults == 1
    assert journal.entries[0].answered == [stray, TEA]


def test_an_agent_that_answers_nonsense_loses_that_message() -> None:
    switchboard, journal = board(Scripted("a", lambda m: ["tea, please", TEA]))
    assert switchboard.deliver(HELLO, 0.0) == []
    assert switchboard.faults == 1
    assert journal.entries[0].raised == "TypeError"


def test_observers_see_every_message_once_and_one_that_raises_harms_nobody() -> None:
    seen: list[Message] = []
    agent = Scripted("a", lambda m: [alert("x")])
    switchboard, _ = board(agent)
    switchboard.observers += [lambda m, now_s: raises(m) and None, lambda m, now_s: seen.append(m)]
    switchboard.deliver(HELLO, 0.0)
    assert seen == [HELLO, alert("x")]
    assert agent.heard == [HELLO]
    assert switchboard.faults == 2


class FullDisk:
    def __init__(self) -> None:
        self.asked = 0

    def write(self, entry: Entry) -> None:
        self.asked += 1
        raise OSError("no space left on device")


def test_a_journal_that_cannot_be_written_ends_and_the_work_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    disk = FullDisk()
    switchboard = Switchboard([Scripted("a", lambda m: [TEA])], epoch=1, journal=disk)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert switchboard.deliver(HELLO, 0.0) == [Command(agent="a", action=TEA)]
    assert (disk.asked, switchboard.faults) == (1, 1)
    assert caplog.text.count("the journal cannot be written and ends here: no space left on device") == 1
    assert "Traceback" not in caplog.text


def test_agents_need_different_names() -> None:
    with pytest.raises(ValueError, match="different names"):
        board(Scripted("a", raises), Scripted("a", raises))


def test_agents_that_answer_each_other_for_ever_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmx.runtime.switchboard._MOST_AT_ONCE", 50)
    echoes = [Scripted(name, lambda message: [message], AlertRaised) for name in ("a", "b")]
    board = Switchboard(echoes, epoch=1, journal=MemoryJournal(limit=0))
    board.deliver(alert("x"), 0.0)
    assert board.faults == 1
    assert len(echoes[0].heard) == 50

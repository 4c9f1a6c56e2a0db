from __future__ import annotations

from collections.abc import Iterable, Sequence

from swarmx.core.actions import Action, Dispatch, StartTimer, StopTimer
from swarmx.core.messages import CallCancelled, Message, TimerFired
from swarmx.core.ports import Output
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell


class Recorder:
    """Notes what it hears and when; does on "start", "restart", "stop" and "send" what the word says."""

    name = "recorder"
    listens: frozenset[type] = frozenset({CallCancelled})
    actions: frozenset[type] = frozenset({StartTimer, StopTimer, Dispatch})

    def __init__(self) -> None:
        self.heard: list[tuple[float, str]] = []

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        word = message.key if isinstance(message, TimerFired) else getattr(message, "call_id", "")
        self.heard.append((now_s, word))
        match word:
            case "start":
                return [StartTimer(key="tea", at_s=10.0)]
            case "restart":
                return [StartTimer(key="tea", at_s=20.0)]
            case "past":
                return [StartTimer(key="tea", at_s=-5.0)]
            case "stop":
                return [StopTimer(key="tea")]
            case "send":
                return [Dispatch(call_id="c", attempt=1, replica_id="r")]
            case _:
                return []


class Echo:
    """Answers every action after two seconds."""

    def perform(self, action: Action, now_s: float) -> Iterable[tuple[float, Message]]:
        return [(2.0, CallCancelled(call_id=f"echo of {type(action).__name__}"))]


def run(*said: tuple[float, str], until_s: float = 100.0) -> list[tuple[float, str]]:
    agent = Recorder()
    shell = VirtualShell(Switchboard([agent], epoch=1, journal=MemoryJournal(limit=0)), Echo())
    for at_s, word in said:
        shell.post(CallCancelled(call_id=word), at_s=at_s)
    shell.run(until_s=until_s)
    return agent.heard


def test_messages_come_in_the_order_of_time_and_then_of_posting() -> None:
    assert run((2.0, "b"), (1.0, "a"), (2.0, "c")) == [(1.0, "a"), (2.0, "b"), (2.0, "c")]


def test_a_timer_fires_at_its_time() -> None:
    assert run((1.0, "start")) == [(1.0, "start"), (10.0, "tea")]


def test_a_timer_of_the_past_fires_at_once() -> None:
    assert run((1.0, "past")) == [(1.0, "past"), (1.0, "tea")]


def test_a_timer_that_was_stopped_does_not_fire() -> None:
    assert run((1.0, "start"), (2.0, "stop")) == [(1.0, "start"), (2.0, "stop")]


def test_a_second_timer_with_the_same_key_replaces_the_first() -> None:
    assert run((1.0, "start"), (2.0, "restart"))[-1] == (20.0, "tea")
    assert len(run((1.0, "start"), (2.0, "restart"))) == 3


def test_the_world_answers_after_its_delay() -> None:
    assert run((1.0, "send")) == [(1.0, "send"), (3.0, "echo of Dispatch")]


def test_a_run_stops_at_its_end_even_behind_a_timer_that_was_stopped() -> None:
    assert run((1.0, "start"), (2.0, "stop"), (50.0, "late"), until_s=20.0) == [(1.0, "start"), (2.0, "stop")]


def test_an_empty_shell_has_nothing_to_do() -> None:
    shell = VirtualShell(Switchboard([Recorder()], epoch=1, journal=MemoryJournal(limit=0)), Echo(), start_s=7.0)
    assert not shell.step()
    assert shell.now_s == 7.0


def test_a_message_for_the_past_is_heard_now() -> None:
    agent = Recorder()
    shell = VirtualShell(Switchboard([agent], epoch=1, journal=MemoryJournal(limit=0)), Echo(), start_s=7.0)
    shell.post(CallCancelled(call_id="a"), at_s=1.0)
    shell.run()
    assert agent.heard == [(7.0, "a")]

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from swarmx.core.actions import Cancel, Dispatch, StartTimer, StopTimer
from swarmx.core.messages import CallCancelled, Message, TimerFired
from swarmx.core.ports import Output
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.switchboard import Switchboard
from tests.agents.worlds import LeapingLoop


class Recorder:
    """Notes what it hears; does on "start", "stop", "send" and "cancel" what the word says."""

    name = "recorder"
    listens: frozenset[type] = frozenset({CallCancelled})
    actions: frozenset[type] = frozenset({StartTimer, StopTimer, Dispatch, Cancel})

    def __init__(self) -> None:
        self.heard: list[tuple[float, str]] = []
        self.inside = False

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        word = message.key if isinstance(message, TimerFired) else getattr(message, "call_id", "")
        self.heard.append((round(now_s, 3), word))
        match word:
            case "start":
                return [StartTimer(key="tea", at_s=10.0)]
            case "restart":
                return [StartTimer(key="tea", at_s=20.0)]
            case "stop":
                return [StopTimer(key="tea")]
            case "send":
                return [Dispatch(call_id="c", attempt=1, replica_id="r"), StartTimer(key="tea", at_s=5.0)]
            case "cancel":
                return [Cancel(call_id="c", attempt=1, replica_id="r")]
            case _:
                return []


def run(
    work: Callable[[LiveShell, Recorder], Coroutine[Any, Any, None]], perform: Callable[[LiveShell], None] | None = None
) -> list[tuple[float, str]]:
    agent, loop = Recorder(), LeapingLoop()
    switchboard = Switchboard([agent], epoch=1, journal=MemoryJournal(limit=0))
    shell = LiveShell(switchboard, loop, {Dispatch: lambda action: perform(shell) if perform else None})

    async def all_of_it() -> None:
        await work(shell, agent)
        await asyncio.sleep(100.0)
        shell.close()

    try:
        loop.run_until_complete(all_of_it())
    finally:
        loop.close()
    return agent.heard


def saying(*said: tuple[float, str]) -> Callable[[LiveShell, Recorder], Coroutine[Any, Any, None]]:
    async def work(shell: LiveShell, agent: Recorder) -> None:
        for at_s, word in said:
            asyncio.get_running_loop().call_at(at_s, shell.post, CallCancelled(call_id=word))

    return work


def test_a_timer_fires_at_its_time() -> None:
    assert run(saying((1.0, "start"))) == [(1.0, "start"), (10.0, "tea")]


def test_a_timer_that_was_stopped_does_not_fire() -> None:
    assert run(saying((1.0, "start"), (2.0, "stop"))) == [(1.0, "start"), (2.0, "stop")]


def test_a_second_timer_with_the_same_key_replaces_the_first() -> None:
    assert run(saying((1.0, "start"), (2.0, "restart"))) == [(1.0, "start"), (2.0, "restart"), (20.0, "tea")]


def test_a_closed_shell_fires_no_timers() -> None:
    async def work(shell: LiveShell, agent: Recorder) -> None:
        shell.post(CallCancelled(call_id="start"))
        shell.close()

    assert run(work) == [(0.0, "start")]


def test_a_message_posted_while_another_is_handled_waits_for_its_turn() -> None:
    def perform(shell: LiveShell) -> None:
        shell.post(CallCancelled(call_id="stop"))

    heard = run(saying((1.0, "send")), perform)
    assert heard == [(1.0, "send"), (1.0, "stop")], "the timer of `send` was set before `stop` was heard"


def test_an_action_that_cannot_be_performed_takes_nothing_else_down(caplog: pytest.LogCaptureFixture) -> None:
    def perform(shell: LiveShell) -> None:
        raise RuntimeError("no")

    assert run(saying((1.0, "send"), (2.0, "x")), perform) == [(1.0, "send"), (2.0, "x"), (5.0, "tea")]
    assert "Dispatch of agent recorder could not be performed" in caplog.text


def test_an_action_that_nobody_performs_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    run(saying((1.0, "cancel")))
    assert "nobody performs Cancel, asked for by recorder" in caplog.text

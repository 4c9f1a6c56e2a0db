"""The live shell: agents on the asyncio loop, real timers, actions performed as they are decided."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from swarmx.core.actions import Action, StartTimer, StopTimer
from swarmx.core.messages import Message, TimerFired
from swarmx.runtime.clock import Clock
from swarmx.runtime.switchboard import Command, Switchboard

log = logging.getLogger(__name__)

Performer = Callable[[Any], None]


class LiveShell:
    """Runs on one event loop; `post` decides and performs before it returns.

    `performers` maps each action type (but timers) to the function that sets it going; it must not block, and one that
    raises is logged and loses that action only. A message that is posted while another is being handled waits for its
    turn, so agents are never entered twice.
    """

    def __init__(self, switchboard: Switchboard, clock: Clock, performers: Mapping[type, Performer]) -> None:
        self._switchboard = switchboard
        self._clock = clock
        self._performers = dict(performers)
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._queue: deque[tuple[Message, str | None]] = deque()
        self._busy = False

    def post(self, message: Message, *, to: str | None = None) -> None:
        """Hand the message to the agents that listen to its type, or to one by name."""
        self._queue.append((message, to))
        if self._busy:
            return
        self._busy = True
        try:
            while self._queue:
                message, to = self._queue.popleft()
                for command in self._switchboard.deliver(message, self._clock.now_s(), to=to):
                    self._perform(command)
        finally:
            self._busy = False

    def close(self) -> None:
        """Drop all timers."""
        for handle in self._timers.values():
            handle.cancel()
        self._timers.clear()

    def _perform(self, command: Command) -> None:
        action: Action = command.action
        match action:
            case StartTimer():
                self._stop_timer(command.agent, action.key)
                delay_s = max(0.0, action.at_s - self._clock.now_s())
                loop = asyncio.get_running_loop()
                handle = loop.call_later(delay_s, self._fire, command.agent, action.key)
                self._timers[command.agent, action.key] = handle
            case StopTimer():
                self._stop_timer(command.agent, action.key)
            case _:
                performer = self._performers.get(type(action))
                if performer is None:
                    log.error("nobody performs %s, asked for by %s", type(action).__name__, command.agent)
                    return
                try:
                    performer(action)
                except Exception:
                    log.exception("%s of agent %s could not be performed", type(action).__name__, command.agent)

    def _stop_timer(self, agent: str, key: str) -> None:
        handle = self._timers.pop((agent, key), None)
        if handle is not None:
            handle.cancel()

    def _fire(self, agent: str, key: str) -> None:
        self._timers.pop((agent, key), None)
        self.post(TimerFired(key=key), to=agent)

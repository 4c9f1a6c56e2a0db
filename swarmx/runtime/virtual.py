"""The virtual-time shell: the same agents, messages and timers, on a heap instead of a clock."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Protocol

from swarmx.core.actions import Action, StartTimer, StopTimer
from swarmx.core.messages import Message, TimerFired
from swarmx.runtime.switchboard import Switchboard


class World(Protocol):
    """What lies outside the agents: answers an action with messages, each after a delay in virtual seconds."""

    def perform(self, action: Action, now_s: float) -> Iterable[tuple[float, Message]]: ...


class VirtualShell:
    """Total order of events: (time, order of scheduling). Nothing here reads a clock or sleeps."""

    def __init__(self, switchboard: Switchboard, world: World, *, start_s: float = 0.0) -> None:
        self.now_s = start_s
        self._switchboard = switchboard
        self._world = world
        self._heap: list[tuple[float, int, Message, str | None]] = []
        self._count = 0
        self._timers: dict[tuple[str, str], int] = {}

    def post(self, message: Message, *, at_s: float | None = None) -> None:
        """Schedule a message; by default for now."""
        self._push(self.now_s if at_s is None else max(at_s, self.now_s), message, None)

    def step(self) -> bool:
        """Handle the next event; False when none is left."""
        if self._next_s() is None:
            return False
        self.now_s, _, message, to = heapq.heappop(self._heap)
        if to is not None and isinstance(message, TimerFired):
            del self._timers[to, message.key]
        for command in self._switchboard.deliver(message, self.now_s, to=to):
            self._perform(command.agent, command.action)
        return True

    def run(self, *, until_s: float = float("inf")) -> None:
        """Handle events up to and including `until_s`, or until none is left."""
        while (next_s := self._next_s()) is not None and next_s <= until_s:
            self.step()

    def _next_s(self) -> float | None:
        """When the next event is due; timers that were stopped or replaced are thrown away first."""
        while self._heap:
            at_s, order, message, to = self._heap[0]
            if to is None or not isinstance(message, TimerFired) or self._timers.get((to, message.key)) == order:
                return at_s
            heapq.heappop(self._heap)
        return None

    def _perform(self, agent: str, action: Action) -> None:
        match action:
            case StartTimer():
                order = self._push(max(action.at_s, self.now_s), TimerFired(key=action.key), agent)
                self._timers[agent, action.key] = order
            case StopTimer():
                self._timers.pop((agent, action.key), None)
            case _:
                for delay_s, message in self._world.perform(action, self.now_s):
                    self._push(self.now_s + delay_s, message, None)

    def _push(self, at_s: float, message: Message, to: str | None) -> int:
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, message, to))
        return self._count

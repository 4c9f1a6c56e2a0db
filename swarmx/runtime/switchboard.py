"""What both shells share: hands messages to the agents that listen, journals each step, collects their actions."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import get_args

import msgspec

from swarmx.core.actions import Action
from swarmx.core.messages import Envelope, Message
from swarmx.core.ports import SchedulerAgent
from swarmx.runtime.journal import Entry, Journal, step

log = logging.getLogger(__name__)

# Types are looked up: `isinstance` of a union asks each of its members, 0.1 ms a decision when the caches are cold.
_MESSAGES = frozenset(get_args(Message))
# Losing a replica re-dispatches all its calls in one delivery; agents that only talk to each other never end.
_MOST_AT_ONCE = 100_000

Observer = Callable[[Message, float], None]


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """An action and the agent that wants it done."""

    agent: str
    action: Action


class Switchboard:
    """Delivers each message to its listeners in a fixed order, and what they say to its listeners in turn.

    An agent that raises, or answers what is neither message nor action, loses that one message; an action outside its
    `actions` is dropped; an observer that raises misses that one; a journal that cannot be written ends there. All of
    it is logged and counted in `faults`: nothing of it may take the others down.
    """

    def __init__(self, agents: Sequence[SchedulerAgent], *, epoch: int, journal: Journal | None) -> None:
        names = [agent.name for agent in agents]
        if len(set(names)) != len(names):
            raise ValueError(f"agents need different names, got {names}")
        self.agents = tuple(agents)
        self.epoch = epoch
        self.faults = 0
        self.observers: list[Observer] = []
        self._journal = journal
        self._seq: dict[str, int] = {}

    def deliver(
        self, message: Message, now_s: float, *, sender: str = "world", cause: str = "", to: str | None = None
    ) -> list[Command]:
        """Hand out the message (to one agent when `to` is given) and everything that follows from it at once."""
        commands: list[Command] = []
        delivered = 0
        queue = deque([(self._envelope(sender, message, cause), to)])
        while queue:
            envelope, only = queue.popleft()
            delivered += 1
            if delivered > _MOST_AT_ONCE:
                self.faults += 1
                log.error("agents answered each other %d times over one message; the rest is dropped", _MOST_AT_ONCE)
                break
            for observer in self.observers:
                self._show(observer, envelope.message, now_s)
            for agent in self.agents:
                if agent.name != only if only is not None else type(envelope.message) not in agent.listens:
                    continue
                for output in self._step(agent, envelope, now_s):
                    kind = type(output)
                    if kind in agent.actions:
                        commands.append(Command(agent=agent.name, action=output))  # type: ignore[arg-type]
                    elif kind in _MESSAGES:
                        queue.append((self._envelope(agent.name, output, envelope.ref), None))  # type: ignore[arg-type]
                    else:
                        self.faults += 1
                        log.error("agent %s asked for an action outside its set; dropped", agent.name)
        return commands

    def _step(self, agent: SchedulerAgent, envelope: Envelope, now_s: float) -> Sequence[Message | Action]:
        answered, error = step(agent, envelope.message, now_s)
        if error is not None:
            self.faults += 1
            log.error("agent %s failed on %s", agent.name, type(envelope.message).__name__, exc_info=error)
        if self._journal is not None:
            raised = type(error).__name__ if error else None
            self._write(
                self._journal, Entry(at_s=now_s, agent=agent.name, heard=envelope, answered=answered, raised=raised)
            )
        return answered

    def _show(self, observer: Observer, message: Message, now_s: float) -> None:
        try:
            observer(message, now_s)
        except Exception:
            self.faults += 1
            log.exception("an observer failed on %s", type(message).__name__)

    def _write(self, journal: Journal, entry: Entry) -> None:
        try:
            journal.write(entry)
        except Exception as error:
            self.faults += 1
            self._journal = None  # a journal with a gap would not replay
            defect = None if isinstance(error, OSError) else error
            log.error("the journal cannot be written and ends here: %s", error, exc_info=defect)

    def _envelope(self, sender: str, message: Message, cause: str) -> Envelope:
        seq = self._seq[sender] = self._seq.get(sender, 0) + 1
        return Envelope(sender=sender, epoch=self.epoch, seq=seq, cause=cause, message=message)

"""The world around simulated routers: a heap of events in virtual time, with clients and replicas on either side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any

import msgspec

from eval.sim.clients import Clients
from eval.sim.faults import Faults
from eval.sim.ledger import Ledger
from eval.sim.machines import Machines
from eval.sim.settings import SimSettings
from eval.sim.timers import Timers
from eval.workloads.plan import Workload
from swarmx.agents.router import RouterAgent
from swarmx.core.actions import Cancel, Dispatch, Refuse, StartTimer, StopTimer
from swarmx.core.messages import AlertRaised, Message, ReplicaChanged, TimerFired
from swarmx.core.nouns import Replica
from swarmx.core.ports import Output

Observer = Callable[[int, Message, float, Sequence[Output]], None]
"""Shown what a router (by number) heard, when, and what it answered."""

_Do = Callable[[Any, Any], None]


class World:
    """One run. Events are in total order: (time, order of scheduling).

    It differs from `runtime.virtual.VirtualShell` in what makes that one slow, and in nothing that a router can see:
    there are no envelopes, no journal and no other agents, what a router says to operators is only counted, timers
    that are far off stay off the heap, and messages go straight to the router whose call it is.
    """

    def __init__(
        self,
        workload: Workload,
        fleet: Sequence[Replica],
        settings: SimSettings,
        seed: int,
        observer: Observer | None = None,
    ) -> None:
        self.now_s = 0.0
        self.events = 0
        self.settings = settings
        self.ledger = Ledger(workload, fleet)
        self._last_s = workload.workflows[-1].at_s if workload.workflows else 0.0
        self._observer = observer
        self._heap: list[tuple[float, int, _Do, Any, Any]] = []
        self._order = count()
        self.routers = [
            RouterAgent(msgspec.structs.replace(settings.router, seed=settings.router.seed * 1009 + number))
            for number in range(settings.routers)
        ]
        self._timers = [self._timers_of(number) for number in range(settings.routers)]
        self.clients = Clients(self, workload, fleet, seed)
        self.machines = Machines(self, fleet, seed)
        self.faults = Faults(self)

    def run(self) -> None:
        """Until every workflow has ended, or the time is up."""
        until_s = self._last_s + self.settings.drain_s
        machines, clients, heap = self.machines, self.clients, self._heap
        for replica in machines.all:
            self.tell_routers(ReplicaChanged(replica=replica.replica, state="ready"))
        self.faults.schedule()
        clients.come(0, None)
        stirred, refused = machines.stirred, clients.refused
        while clients.left:
            if stirred and (not heap or heap[0][0] > self.now_s):
                machines.settle()
            if not heap or heap[0][0] > until_s:
                self.now_s = until_s
                break
            self.now_s, _, do, one, other = heappop(heap)
            self.events += 1
            do(one, other)
            if refused:
                clients.give_up()
        for replica in machines.all:
            replica.close(self.now_s)

    def at(self, at_s: float, do: _Do, one: Any, other: Any) -> None:
        """Schedule `do(one, other)`."""
        heappush(self._heap, (at_s, next(self._order), do, one, other))

    def tell(self, router: int, message: Message) -> None:
        """The router hears the message, and what it wants is done."""
        now_s = self.now_s
        outputs = self.routers[router].handle(message, now_s)
        self.ledger.messages += 1
        if self._observer is not None:
            self._observer(router, message, now_s, outputs)
        for output in outputs:
            match output:
                case Dispatch():
                    self._dispatch(output)
                case StartTimer():
                    self._timers[router].start(output.key, output.at_s, now_s)
                case StopTimer():
                    self._timers[router].stop(output.key)
                case Cancel():
                    self._cancel(output)
                case Refuse():
                    live = self.clients.live[output.call_id]
                    live.placed = False
                    self.clients.refused.append(live)
                case AlertRaised():
                    self.ledger.alerted(output.kind)
                case _:
                    pass  # for operators

    def tell_routers(self, message: Message) -> None:
        """All of them."""
        for number in range(len(self.routers)):
            self.tell(number, message)

    def _dispatch(self, action: Dispatch) -> None:
        live, leaves_s = self.clients.live[action.call_id], self.now_s + self.settings.decision_s
        live.attempt, live.placed = action.attempt, True
        live.replica = self.machines.by_id[action.replica_id].number
        self.ledger.dispatched(live, leaves_s)
        self.at(leaves_s + self.settings.network_s, self.machines.arrive, live, action)

    def _cancel(self, action: Cancel) -> None:
        live = self.clients.live.get(action.call_id)
        if live is not None and live.attempt == action.attempt:
            live.placed = False
        self.ledger.cancels += 1
        replica = self.machines.by_id[action.replica_id]
        self.at(self.now_s + self.settings.network_s, self.machines.abort, replica, action)

    def _timers_of(self, router: int) -> Timers:
        def fire(key: str, at_s: float) -> None:
            if timers.fires(key, at_s):
                self.tell(router, TimerFired(key=key))

        timers = Timers(
            lambda at_s, key: self.at(at_s, fire, key, at_s),
            lambda at_s, number: self.at(at_s, lambda bucket, _: timers.open(bucket), number, None),
        )
        return timers

"""The replicas' side of a simulation: takes requests in, lets engines run, and sends back what they have to tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

import numpy as np

from eval.sim.clients import lognormal
from eval.sim.flow import LiveCall
from eval.sim.replicas import SimReplica
from swarmx.core.actions import Cancel, Dispatch
from swarmx.core.batching import Event, Request
from swarmx.core.messages import CallFinished, FirstToken, Message, TokensProgressed
from swarmx.core.nouns import FailureReason, Replica

if TYPE_CHECKING:
    from eval.sim.world import World


class Machines:
    """All replicas, by number and by id."""

    def __init__(self, world: World, fleet: Sequence[Replica], seed: int) -> None:
        self._world = world
        self._settings = settings = world.settings
        speeds = lognormal(settings.speed_error, len(fleet), [seed, 1])
        self.all = [
            SimReplica(number=i, replica=replica, settings=settings, speed=speed)
            for i, (replica, speed) in enumerate(zip(fleet, speeds, strict=True))
        ]
        self.by_id = {each.replica.replica_id: each for each in self.all}
        self.stirred: dict[int, SimReplica] = {}  # engines whose next event may have moved
        if settings.signal_every_s > 0.0:
            phases = np.random.default_rng([seed, 3]).random(len(fleet)) * settings.signal_every_s
            for replica, phase_s in zip(self.all, phases.tolist(), strict=True):
                world.at(phase_s, self._signal, replica, None)

    def arrive(self, live: LiveCall, action: Dispatch) -> None:
        """The request reaches the replica, or its door is closed."""
        if not live.is_at(action.attempt):
            return
        replica, planned = self.all[live.replica], live.planned
        if replica.condition in ("down", "starting"):
            self._break(live, action.attempt, "connect")
            return
        request = Request(
            request_id=live.name(action.attempt),
            prompt_tokens=planned.prompt_tokens,
            output_tokens=max(1, round(planned.work)),
            prefix=planned.blocks,
            priority=action.urgency,
        )
        if replica.submit(request, live, self._world.now_s):
            self.stir(replica)
        else:
            self._break(live, action.attempt, "rejected")

    def abort(self, replica: SimReplica, action: Cancel) -> None:
        """The connection was closed."""
        name = action.call_id if action.attempt == 1 else f"{action.call_id}#{action.attempt}"
        if replica.abort(name, self._world.now_s):
            self.stir(replica)
            self._world.faults.emptied(replica)

    def lose(self, replica: SimReplica, reason: FailureReason) -> None:
        """The replica stops at once; those whose calls it held will see their connections break."""
        self.stir(replica)
        for name, live in replica.stop(self._world.now_s).items():
            if live.wants(name):
                self._break(live, live.attempt, reason)

    def stir(self, replica: SimReplica) -> None:
        """The engine's next event may have moved."""
        self.stirred[replica.number] = replica

    def settle(self) -> None:
        """Schedule the next event of every engine that was touched at this moment."""
        for replica in self.stirred.values():
            due_s = replica.next_s() if replica.holds else None
            if due_s != replica.due_s:
                replica.due_s = due_s
                replica.due_event += 1
                if due_s is not None:
                    self._world.at(max(due_s, self._world.now_s), self._step, replica, replica.due_event)
        self.stirred.clear()

    def _step(self, replica: SimReplica, event: int) -> None:
        """The engine has something to tell, unless that was overtaken."""
        if event == replica.due_event:
            replica.due_s = None
            self._happened(replica, replica.due(self._world.now_s))

    def _happened(self, replica: SimReplica, events: list[Event]) -> None:
        self.stir(replica)
        if not events:
            return
        now_s, holds = self._world.now_s, replica.holds
        events = [event for event in events if event.request_id in holds]  # others were aborted since
        if admitted := [holds[event.request_id] for event in events if event.kind == "admitted"]:
            self._world.ledger.admitted(admitted, replica.hits())
        for event in events:
            name = event.request_id
            match event.kind:
                case "finished":
                    self._finished(replica.finished(name, now_s), name)
                case "first_token":
                    self._began(replica, holds[name], name)
                case "admitted" | "preempted":
                    pass
                case _:
                    assert_never(event.kind)
        self._world.faults.emptied(replica)

    def _finished(self, live: LiveCall, name: str) -> None:
        if not live.wants(name):
            return
        world = self._world
        message = CallFinished(
            call_id=live.call_id,
            attempt=live.attempt,
            prompt_tokens=live.planned.prompt_tokens,
            cached_tokens=world.ledger.cached_tokens[live.number],
            work_done=live.planned.work,
        )
        world.at(world.now_s + self._settings.network_s, world.clients.finished, live, message)

    def _began(self, replica: SimReplica, live: LiveCall, name: str) -> None:
        if not live.wants(name):
            return
        world = self._world
        world.ledger.began(live, world.now_s)
        if not self._settings.stream or live.planned.kind != "llm":
            return
        message = FirstToken(call_id=live.call_id, attempt=live.attempt)
        world.at(world.now_s + self._settings.network_s, self._streams, live, message)
        live.first_token_s = world.now_s
        batch = len(replica.holds)
        self._look_again(live, replica.replica.profile.step_s(batch, batch * live.planned.prompt_tokens))

    def _look_again(self, live: LiveCall, pace_s: float) -> None:
        wait_s = self._settings.progress_tokens * max(pace_s, 1e-6)
        self._world.at(self._world.now_s + wait_s, self._progress, live, live.attempt)

    def _progress(self, live: LiveCall, attempt: int) -> None:
        """Tell how far the answer has come, about every so many tokens: the pace so far says when to look again."""
        world, replica, name = self._world, self.all[live.replica], live.name(attempt)
        if not live.is_at(attempt) or name not in replica.holds:
            return
        self._happened(replica, replica.advance(world.now_s))
        if name not in replica.holds:
            return
        produced = replica.produced(name)
        message = TokensProgressed(call_id=live.call_id, attempt=attempt, work_done=float(produced))
        world.at(world.now_s + self._settings.network_s, self._streams, live, message)
        self._look_again(live, (world.now_s - live.first_token_s) / max(1, produced - 1))

    def _streams(self, live: LiveCall, message: FirstToken | TokensProgressed) -> None:
        if live.is_at(message.attempt):
            live.streamed = True
            self._world.tell(live.router, message)

    def _break(self, live: LiveCall, attempt: int, reason: FailureReason) -> None:
        world = self._world
        world.at(world.now_s + self._settings.network_s, world.clients.broke, live, (attempt, reason))

    def _signal(self, replica: SimReplica, _: None) -> None:
        """The replica reads its counters; routers hear of them once they have travelled."""
        world = self._world
        world.at(world.now_s + self._settings.signal_every_s, self._signal, replica, None)
        if replica.condition in ("down", "starting"):
            return
        if replica.holds:
            self._happened(replica, replica.advance(world.now_s))
            if replica.condition == "down":  # it had been draining
                return
        world.at(world.now_s + self._settings.signal_age_s, self._hear, replica.signal(world.now_s), None)

    def _hear(self, message: Message, _: None) -> None:
        self._world.tell_routers(message)

"""Carries out what is decided about replicas: starts, cordons, drains and ends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import assert_never

import msgspec

from swarmx.core.actions import Cordon, Deploy, Drain
from swarmx.core.control import Actor, Change, Via
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.messages import (
    AlertRaised,
    CallCancelled,
    CallFailed,
    CallFinished,
    Message,
    ReplicaChanged,
    TimerFired,
)
from swarmx.core.nouns import Replica, ReplicaGroup, ReplicaState
from swarmx.core.ports import AuditTrail, ElasticProvider
from swarmx.runtime.audited import Ending, Errand, carry_out
from swarmx.runtime.clock import Clock
from swarmx.runtime.watch import Watch

log = logging.getLogger(__name__)

SCALER = Actor(type="agent", name="scaler", role="operator")
_AGAIN_S = 5.0  # after the end of a dead replica could not be written down
FLEET = Actor(type="system", name="fleet", role="operator")

# After any of these a call may have left its replica: a router that loses patience hears only its own timer.
_MAY_END_A_CALL = (CallFinished, CallFailed, CallCancelled, ReplicaChanged, TimerFired)


@dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """A replica as the fleet knows it: `state` was announced last, `when_up` is to be announced while it answers."""

    replica: Replica
    state: ReplicaState
    when_up: ReplicaState = "ready"
    provider: ElasticProvider | None = None  # of a replica that was deployed here
    start: asyncio.Task[None] | None = None  # until it is up
    ending: bool = False


class Fleet:
    """Performs Deploy, Drain and Cordon, each in a task of its own; nothing is raised to those who asked.

    Replicas that were deployed here are its own: it ends them when they are drained, and when they stop answering.
    Others it takes out of rotation at most. Nothing happens without an intent in `audit`. `in_flight` is the router's
    count of its calls on a replica; `on_started` is told a group id and the seconds that a start in it took. Register
    `observe` with the switchboard, and hand `state_when_up` to the watch. Raises ConfigError when the provider of a
    group is not there.
    """

    def __init__(
        self,
        *,
        providers: Mapping[str, ElasticProvider],
        groups: Sequence[ReplicaGroup],
        watch: Watch,
        post: Callable[[Message], None],
        clock: Clock,
        audit: AuditTrail,
        in_flight: Callable[[str], int],
        on_started: Callable[[str, float], None] = lambda group_id, seconds: None,
    ) -> None:
        for group in groups:
            if group.provider not in providers:
                known = ", ".join(providers) or "none"
                raise ConfigError(f"group {group.group_id}: provider {group.provider!r} is not there, only: {known}.")
        self._providers = dict(providers)
        self._groups = {group.group_id: group for group in groups}
        self._watch = watch
        self._post = post
        self._clock = clock
        self._audit = audit
        self._in_flight = in_flight
        self._on_started = on_started
        self._members: dict[str, _Member] = {}
        self._may_be_empty: dict[str, asyncio.Event] = {}  # of the replicas that are being drained
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def is_elastic(self, replica_id: str) -> bool:
        """Whether the replica was deployed here, and so can be ended here."""
        member = self._members.get(replica_id)
        return member is not None and member.provider is not None

    def state_when_up(self, replica_id: str) -> ReplicaState:
        """The state of the replica, if it answers."""
        member = self._members.get(replica_id)
        return "ready" if member is None else member.when_up

    def observe(self, message: Message, now_s: float) -> None:
        """Follow the states of all replicas, and end one of our own that is gone."""
        if isinstance(message, ReplicaChanged):
            self._changed(message)
        if self._may_be_empty and isinstance(message, _MAY_END_A_CALL):
            for event in self._may_be_empty.values():
                event.set()

    def perform_deploy(self, action: Deploy) -> None:
        self.begin(action, actor=SCALER, via="agent")

    def perform_drain(self, action: Drain) -> None:
        self.begin(action, actor=SCALER, via="agent")

    def begin(self, action: Deploy | Drain | Cordon, *, actor: Actor, via: Via, intent_seq: int | None = None) -> None:
        """Set the action going. With `intent_seq` the audit log has its intent, and only the outcome is written.

        What cannot be done becomes a failed outcome: an id that is taken or unknown, a group that there is not.
        """
        if self._closed:
            log.info("%s comes too late, SwarmX stops", action)
            return
        member = self._members.get(action.replica_id)
        errand = self._errand(action, member, actor, via, intent_seq)
        if isinstance(action, Deploy):
            self._begin_deploy(errand, action)
        elif member is None:
            self._refuse(errand, f"there is no replica {action.replica_id!r}")
        elif member.ending and isinstance(action, Drain) and actor.type == "agent":
            log.info("replica %s is being drained already", action.replica_id)
        elif member.ending:
            self._refuse(errand, f"replica {action.replica_id} is being ended already")
        elif isinstance(action, Drain):
            self._spawn_end(errand, member, partial(self._drain, member, action.deadline_at_s))
        else:
            self._spawn(errand, partial(self._cordon, member, action.cordoned))

    def adopt(self, replica: Replica, group: ReplicaGroup) -> None:
        """Take over a replica that an earlier life deployed: from now on it is as if it was deployed here."""
        provider = self._providers[group.provider]
        self._members[replica.replica_id] = _Member(replica=replica, state="starting", provider=provider)
        self._post(ReplicaChanged(replica=replica, state="starting", group_id=group.group_id))
        self._watch.add(replica)

    def lost(self, replica_id: str) -> None:
        """Somebody who knows says that the replica is no more; the watch would see it too, later."""
        member = self._members.get(replica_id)
        if member is not None and member.start is None and member.state != "gone":
            self._watch.remove(replica_id)
            self._post(ReplicaChanged(replica=member.replica, state="gone"))

    async def close(self) -> None:
        """Call off what is going on. Replicas that are up stay: their providers end them."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin_deploy(self, errand: Errand, action: Deploy) -> None:
        group = self._groups.get(action.group_id)
        if group is None:
            self._refuse(errand, f"there is no group {action.group_id!r}, only: {', '.join(self._groups) or 'none'}")
        elif action.replica_id in self._members:
            self._refuse(errand, f"replica {action.replica_id} is there already")
        else:
            provider = self._providers[group.provider]
            member = _Member(replica=group.replica(action.replica_id), state="starting", provider=provider)
            self._members[action.replica_id] = member
            work = partial(self._deploy, member, provider, group)
            member.start = self._spawn(errand, work, undo=partial(self._not_started, member))

    async def _deploy(self, member: _Member, provider: ElasticProvider, group: ReplicaGroup) -> Ending:
        began_at_s = self._clock.now_s()
        self._post(ReplicaChanged(replica=member.replica, state="starting"))
        replica = await provider.deploy(member.replica.replica_id, group)
        seconds = self._clock.now_s() - began_at_s
        member.start = None
        self._watch.add(replica)
        self._on_started(group.group_id, seconds)
        return "applied", f"up after {seconds:.1f} s"

    def _not_started(self, member: _Member) -> None:
        if member.start is None:
            return  # it is up: to be called off came too late for anything but its outcome
        self._post(ReplicaChanged(replica=member.replica, state="gone"))
        del self._members[member.replica.replica_id]
        if not (member.ending or self._closed):
            self._post(AlertRaised(kind="replica_failed", subject=member.replica.replica_id))

    async def _drain(self, member: _Member, deadline_at_s: float) -> Ending:
        if member.start is not None:
            self._post(ReplicaChanged(replica=member.replica, state="draining"))  # called off, not failed
            member.start.cancel()
            await asyncio.wait({member.start})
            return "applied", "its start was called off"
        member.when_up = "draining"
        self._announce(member)
        left = await self._wait_until_empty(member.replica.replica_id, deadline_at_s)
        said = f"{left} calls were left at the deadline" if left else "no call was left"
        if member.provider is not None:
            await self._end(member, member.provider)
            return "applied", said
        member.when_up, member.ending = "cordoned", False
        self._announce(member)
        return "applied", f"{said}; it stays cordoned, somebody else runs it"

    async def _wait_until_empty(self, replica_id: str, deadline_at_s: float) -> int:
        """Wait until no call is on the replica, or for the deadline; returns how many are left."""
        event = self._may_be_empty[replica_id] = asyncio.Event()
        try:
            async with asyncio.timeout(deadline_at_s - self._clock.now_s()):
                while self._in_flight(replica_id) > 0:
                    event.clear()
                    await event.wait()
        except TimeoutError:
            pass
        finally:
            del self._may_be_empty[replica_id]
        return self._in_flight(replica_id)

    async def _end(self, member: _Member, provider: ElasticProvider) -> None:
        """The router hears of it first, so that calls which can move elsewhere do, rather than fail here."""
        replica = member.replica
        self._watch.remove(replica.replica_id)
        if member.state != "gone":
            self._post(ReplicaChanged(replica=replica, state="gone"))
        try:
            await provider.retire(replica.replica_id)
        finally:
            del self._members[replica.replica_id]

    async def _end_dead(self, member: _Member, provider: ElasticProvider) -> Ending:
        if member.state != "gone":
            return "stale", "it answers again"
        await self._end(member, provider)
        return "applied", "it had stopped answering"

    async def _cordon(self, member: _Member, cordoned: bool) -> Ending:
        if member.ending:
            return "stale", "it is being drained"
        member.when_up = "cordoned" if cordoned else "ready"
        self._announce(member)
        return "applied", ""

    def _announce(self, member: _Member) -> None:
        """Tell the state that it has by our will; of one that does not answer the watch tells it when it does."""
        if member.state in ("ready", "cordoned", "draining") and member.state != member.when_up:
            self._post(ReplicaChanged(replica=member.replica, state=member.when_up))

    def _changed(self, message: ReplicaChanged) -> None:
        replica, state = message.replica, message.state
        member = self._members.get(replica.replica_id)
        if member is None:
            if state != "gone":
                self._members[replica.replica_id] = _Member(replica=replica, state=state)
            return
        member.replica, member.state = replica, state
        self._end_if_dead(member)

    def _end_if_dead(self, member: _Member) -> None:
        """End what is left of a replica of our own that stopped answering."""
        replica_id = member.replica.replica_id
        dead = member.state == "gone" and member.start is None and not member.ending
        if dead and member.provider is not None and not self._closed and self._members.get(replica_id) is member:
            errand = Errand(
                tool="retire",
                arguments={"replica_id": replica_id},
                effect="irreversible",
                change=Change(subject=replica_id, what="process", before="not answering", after="ended"),
                actor=FLEET,
                via="agent",
            )
            self._spawn_end(errand, member, partial(self._end_dead, member, member.provider))

    def _errand(
        self,
        action: Deploy | Drain | Cordon,
        member: _Member | None,
        actor: Actor,
        via: Via,
        intent_seq: int | None,
    ) -> Errand:
        match action:
            case Deploy():
                after = "ready"
            case Drain():
                after = "gone" if self.is_elastic(action.replica_id) else "cordoned"
            case Cordon():
                after = "cordoned" if action.cordoned else "ready"
            case _:
                assert_never(action)
        arguments = msgspec.to_builtins(action)
        return Errand(
            tool=arguments.pop("type").lower(),
            arguments=arguments,
            effect="irreversible" if after == "gone" else "reversible",
            change=Change(
                subject=action.replica_id, what="state", before=None if member is None else member.state, after=after
            ),
            actor=actor,
            via=via,
            intent_seq=intent_seq,
        )

    def _refuse(self, errand: Errand, problem: str) -> None:
        async def fail() -> Ending:
            raise ReplicaError(problem)

        self._spawn(errand, fail)

    def _spawn_end(self, errand: Errand, member: _Member, work: Callable[[], Awaitable[Ending]]) -> None:
        def keep() -> None:
            member.ending = False
            if member.state == "gone" and member.provider is not None and not self._closed:
                asyncio.get_running_loop().call_later(_AGAIN_S, self._end_if_dead, member)

        member.ending = True
        self._spawn(errand, work, undo=keep)

    def _spawn(
        self, errand: Errand, work: Callable[[], Awaitable[Ending]], *, undo: Callable[[], None] = lambda: None
    ) -> asyncio.Task[None]:
        """Carry out the errand; `undo` takes the claims back when it was not applied."""

        async def run() -> None:
            applied = False
            try:
                applied = await carry_out(self._audit, errand, work)
            finally:
                if not applied:
                    undo()

        task = asyncio.create_task(run(), name=f"{errand.tool} {errand.change.subject}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

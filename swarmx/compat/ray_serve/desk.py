"""Where a Serve router's requests become calls of the router agent, and its dispatches become replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from swarmx.agents.put_off import TIMER as PUT_OFF
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.compat.ray_serve.decision_log import DecisionLog
from swarmx.compat.ray_serve.known_replica import KnownReplica, differs
from swarmx.compat.ray_serve.options import RouterOptions
from swarmx.compat.ray_serve.pace import Pace
from swarmx.compat.ray_serve.signals import ReplicaSignal
from swarmx.compat.ray_serve.ticket import UNREAD, NoReplica, Seen, Ticket
from swarmx.compat.ray_serve.workflows import SilentWorkflows
from swarmx.core.actions import Cancel, Dispatch, Refuse
from swarmx.core.engine import EngineProfile
from swarmx.core.messages import (
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    DemandReported,
    ForecastRefined,
    Message,
    ReplicaChanged,
    SignalReported,
    TimerFired,
    WorkflowEnded,
)
from swarmx.core.nouns import Call, FailureReason, Replica
from swarmx.core.ports import Forecaster
from swarmx.core.prompts import PromptText
from swarmx.runtime.clock import Clock
from swarmx.runtime.journal import Journal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.requests import new_id
from swarmx.runtime.switchboard import Switchboard

_ENDLESS = 1_000_000  # attempts: a replica that is full is no reason to give a call up
_HOLD_DEPTH = 32  # Serve's replicas take few calls, so that many wait here
_CLAIM_S = 10.0  # within which a request that was given a replica is on its way there
_ENOUGH = 3  # calls that tell how fast a replica is
_READ_S = 0.005  # after a replica has taken a request, its prompt is read: until then it would be in the way
_LEARN_S = 0.005  # after which an answer is learnt from: whoever gets its place is on the way by then
_LATER_S = 0.5  # after which a decision is put on record, if its replica has not answered by then


class Desk:
    """The router agent of one deployment in one process, in its own shell; all methods on one event loop.

    `forecasters` are who forecasts at once, and who does it better once it has read the prompt. Where it does not read
    first, its word counts for all that follows, and for those that wait. `on_report` hears what the agent reports of
    the demand.
    """

    def __init__(
        self,
        deployment: str,
        options: RouterOptions,
        *,
        clock: Clock,
        forecasters: Callable[[Callable[[Message], None]], tuple[Forecaster, Forecaster | None]],
        decisions: DecisionLog | None = None,
        journal: Journal | None = None,
        on_report: Callable[[DemandReported], None] = lambda report: None,
    ) -> None:
        self.deployment = deployment
        self.options = options
        self._clock = clock
        self._first = options.engine(deployment)
        self._decisions = decisions
        self._on_report = on_report
        self._agent = RouterAgent(self.settings(deployment, options))
        switchboard = Switchboard([self._agent], epoch=int(clock.now_s()), journal=journal)
        switchboard.observers.append(self._observe)
        self._switchboard = switchboard
        self._shell = LiveShell(
            switchboard, clock, {Dispatch: self._dispatch, Cancel: self._cancel, Refuse: self._refuse}
        )
        self._alike, self._reader = forecasters(self._shell.post)
        self._heard_at_s = 0.0  # when what is being handled began to be
        self._claims: asyncio.TimerHandle | None = None  # for the place that will have been unclaimed for too long next
        self._known: dict[str, KnownReplica] = {}
        self._tickets: dict[str, Ticket] = {}
        self._workflows = SilentWorkflows(idle_s=options.workflow_idle_s, clock=clock, post=self._tell_workflow)

    @staticmethod
    def settings(deployment: str, options: RouterOptions) -> RouterSettings:
        """The agent's own form of the options."""
        return RouterSettings(
            policy=options.policy,
            parameters=options.policy_parameters(),
            seed=options.seed,
            max_attempts=_ENDLESS,
            queue_timeout_s=options.call_timeout_s,
            first_token_timeout_s=options.call_timeout_s,
            call_timeout_s=options.call_timeout_s,
            hold_depth=_HOLD_DEPTH,
            models=[deployment],
            targets=options.targets,
            shared=True,
            log_decisions=bool(options.log_dir or options.log_url),
            put_off_s=_LATER_S,
        )

    @property
    def faults(self) -> int:
        """Messages that the agent, or who watches it, failed on."""
        return self._switchboard.faults

    @property
    def waiting(self) -> int:
        """Requests that wait for a replica here."""
        return sum(ticket.chosen is not None for ticket in self._tickets.values())

    def in_flight(self, replica_id: str) -> int:
        """Calls of this router that are on the replica, or on their way there."""
        return self._agent.in_flight(replica_id)

    def ticket(self, call: Call, prompt: PromptText) -> Ticket:
        """A request with the forecast of its work, once for all attempts. Its call is nobody else's."""
        if self._reader is None or not self.options.read_first:
            later = None if self._reader is None else prompt
            return Ticket(call=call, prompt=later, forecast=self._alike.forecast(call, UNREAD))
        encoding = self._reader.encode(call, prompt)
        return Ticket(call=call, prompt=None, encoding=encoding, forecast=self._reader.forecast(call, encoding))

    def replicas(self, seen: Sequence[Seen]) -> None:
        """These replicas there are now, and no others."""
        now_s = self._clock.now_s()
        for replica_id in self._known.keys() - {one.replica_id for one in seen}:
            self.lost(replica_id)
        for one in seen:
            known = self._known.get(one.replica_id)
            if known is None:
                profile = msgspec.structs.replace(
                    self._fastest() or self._first, model=self.deployment, max_batch=one.max_ongoing
                )
                replica = Replica(
                    replica_id=one.replica_id,
                    model=self.deployment,
                    kind="llm",
                    device=profile.device,
                    url="",
                    profile=profile,
                    provider="ray",
                    emulated=False,
                )
                self._known[one.replica_id] = KnownReplica(replica=replica, pace=Pace(self._first), since_s=now_s)
                self._shell.post(ReplicaChanged(replica=replica, state="ready"))
            elif known.replica.profile.max_batch != one.max_ongoing:
                self._tell_profile(known, msgspec.structs.replace(known.replica.profile, max_batch=one.max_ongoing))

    def lost(self, replica_id: str) -> None:
        """The replica is gone; what it had is over for it, and whoever is asked next is another."""
        known = self._known.get(replica_id)
        if known is None:
            return
        self._shell.post(ReplicaChanged(replica=known.replica, state="draining"))  # what waits goes elsewhere
        for ticket in [t for t in self._tickets.values() if t.replica_id == replica_id]:
            self.ended(ticket, failed="replica_gone")
        del self._known[replica_id]
        self._shell.post(ReplicaChanged(replica=known.replica, state="gone"))

    def ask(self, ticket: Ticket, *, running: int | None = None) -> asyncio.Future[str]:
        """Have the agent find a replica for the request. The future has it, now or later, or NoReplica.

        Asked again for a request that was given a replica, this means that the replica did not take it, since it had
        `running` others.
        """
        if ticket.chosen is not None:
            raise RuntimeError(f"{ticket.call.call_id} is being placed already")
        loop = asyncio.get_running_loop()
        chosen = ticket.chosen = loop.create_future()
        if ticket.replica_id is not None and ticket.call.call_id in self._tickets:
            if running is not None:
                self.counted(ticket.replica_id, running + 1)  # for the agent, this one is there still
            self._moved(ticket, "busy", retryable=True)
        else:
            self._begin(ticket)
        if ticket.prompt is not None and ticket.replica_id is None:  # who waits is weighed by the better forecast
            loop.call_soon(self._read, ticket)
        return chosen

    async def place(self, ticket: Ticket, *, running: int | None = None) -> str:
        """The replica for the request, once the agent has one. Raises NoReplica."""
        chosen = self.ask(ticket, running=running)
        try:
            return await chosen
        except asyncio.CancelledError:
            self.cancelled(ticket)
            raise

    def since_placed_s(self, ticket: Ticket) -> float:
        """Seconds since that began to be handled which got the request its place."""
        return self._clock.now_s() - ticket.placed_at_s

    def accepted(self, ticket: Ticket) -> None:
        """The replica has taken the request."""
        ticket.accepted = True
        if ticket.prompt is not None:
            asyncio.get_running_loop().call_later(_READ_S, self._read, ticket)

    def ended(self, ticket: Ticket, *, failed: FailureReason | None = None) -> None:
        """The request is over, with an answer or (`failed`) without."""
        call_id = ticket.call.call_id
        if ticket.over or self._tickets.get(call_id) is not ticket or ticket.replica_id is None:
            return
        now_s = self._clock.now_s()
        ticket.took_s, ticket.over = now_s - ticket.sent_at_s, True
        if (known := self._known.get(ticket.replica_id)) is not None and ticket.took_s > 0.0:
            ticket.batch = max(1.0, (known.changed(-1, now_s) - ticket.area) / ticket.took_s)
        attempt = ticket.attempt
        del self._tickets[call_id]
        self._workflows.leave(ticket.call)
        if failed is not None:
            self._shell.post(CallFailed(call_id=call_id, attempt=attempt, reason=failed, retryable=False))
            return
        self._shell.post(
            CallFinished(
                call_id=call_id,
                attempt=attempt,
                prompt_tokens=ticket.call.prompt_tokens,
                cached_tokens=0,
                work_done=0.0,  # what it came to is heard later, by `worked`; a pace is learnt there
            )
        )
        if ticket.said is not None:
            self.worked(ticket, ticket.said)

    def worked(self, ticket: Ticket, work: float | None) -> None:
        """What the request came to, once it is known. It is learnt some milliseconds after that and the request's end.

        None where its answer does not tell: then its time stands for its work, at the pace of the replica, and the
        pace is learnt from the work that was expected.
        """
        if work is not None:
            ticket.said = work
        if ticket.took_s is not None:
            asyncio.get_running_loop().call_later(_LEARN_S, self._learn, ticket)

    def _learn(self, ticket: Ticket) -> None:
        """Teach the forecasters and the pace of the replica, once a request."""
        if ticket.work is not None or ticket.took_s is None or ticket.replica_id is None:
            return
        known, work = self._known.get(ticket.replica_id), ticket.said
        if known is None and work is None:
            return
        seen = ticket.forecast.mean if work is None else work
        ticket.work = self._implied(ticket, known) if work is None and known is not None else seen
        (self._reader or self._alike).observe(ticket.call, ticket.encoding, ticket.work)
        if known is not None:
            prompt_tokens = float(ticket.call.prompt_tokens)
            known.pace.observe(ticket.took_s, work=seen, prompt_tokens=prompt_tokens, batch=ticket.batch)
            self._learnt(known)

    def cancelled(self, ticket: Ticket) -> None:
        """Nobody wants the answer any more, or the request never left."""
        if self._tickets.get(ticket.call.call_id) is ticket:
            del self._tickets[ticket.call.call_id]
            ticket.over, ticket.chosen = True, None
            if ticket.replica_id is not None and (known := self._known.get(ticket.replica_id)) is not None:
                known.changed(-1, self._clock.now_s())
            self._workflows.leave(ticket.call)
            self._shell.post(CallCancelled(call_id=ticket.call.call_id))

    def give_back(self, now_s: float) -> None:
        """Take the places back that requests were given long ago and never went to."""
        self._claims = None
        given = [t for t in self._tickets.values() if t.replica_id and not t.accepted and t.chosen is None]
        for ticket in given:
            if now_s >= ticket.sent_at_s + _CLAIM_S:
                self.cancelled(ticket)
        next_s = min((t.sent_at_s + _CLAIM_S for t in given if not t.over), default=None)
        if next_s is not None:
            self._claim(next_s - now_s)

    def _claim(self, within_s: float) -> None:
        self._claims = asyncio.get_running_loop().call_later(within_s, lambda: self.give_back(self._clock.now_s()))

    def counted(self, replica_id: str, running: int) -> None:
        """The replica itself has just said how many calls it has, of all routers."""
        self._signal(replica_id, running, 0, 0.0, self._clock.now_s())

    def heard(self, signal: ReplicaSignal) -> None:
        """A replica pushed its state; an older one does not count."""
        known = self._known.get(signal.replica_id)
        if known is None or signal.at_s <= known.said_at_s:
            return
        at_s = known.said(signal.at_s, self._clock.now_s())
        self._signal(signal.replica_id, signal.running, signal.waiting, signal.kv_usage, at_s)
        if signal.profile is not None:
            known.told, known.told_calls = signal.profile, signal.calls
            self._learnt(known)

    def close(self) -> None:
        """Drop all timers, and write what is not written."""
        self._switchboard.deliver(TimerFired(key=PUT_OFF), self._clock.now_s())
        self._shell.close()
        if self._claims is not None:
            self._claims.cancel()
        self._workflows.close()
        if self._decisions is not None:
            self._decisions.close()

    def _begin(self, ticket: Ticket) -> None:
        """A fresh attempt at a request: it has no replica, or lost the one that it had."""
        if ticket.over:  # an answer was lost after the replica had taken the request: for the agent a call of its own
            ticket.call = msgspec.structs.replace(ticket.call, call_id=new_id("call"))
            ticket.over, ticket.accepted, ticket.took_s, ticket.said = False, False, None, None
        ticket.attempt, ticket.replica_id = 0, None
        self._tickets[ticket.call.call_id] = ticket
        self._workflows.enter(ticket.call)
        self._shell.post(CallReady(call=ticket.call, forecast=ticket.forecast))

    def _read(self, ticket: Ticket) -> None:
        """Forecast by the prompt; whoever is over by now did not need it."""
        if self._reader is None or ticket.prompt is None or ticket.over:
            return
        ticket.encoding, ticket.prompt = self._reader.encode(ticket.call, ticket.prompt), None
        ticket.forecast = self._reader.forecast(ticket.call, ticket.encoding)
        self._shell.post(ForecastRefined(call_id=ticket.call.call_id, forecast=ticket.forecast))

    def _moved(self, ticket: Ticket, reason: FailureReason, *, retryable: bool) -> None:
        """The replica did not take the request; the agent is asked for another."""
        if (known := self._known.get(ticket.replica_id or "")) is not None:
            known.changed(-1, self._clock.now_s())
        ticket.replica_id = None
        self._shell.post(
            CallFailed(call_id=ticket.call.call_id, attempt=ticket.attempt, reason=reason, retryable=retryable)
        )

    def _dispatch(self, action: Dispatch) -> None:
        ticket = self._tickets.get(action.call_id)
        if ticket is None or ticket.chosen is None or ticket.chosen.done():
            return
        now_s = self._clock.now_s()
        ticket.attempt, ticket.replica_id = action.attempt, action.replica_id
        ticket.placed_at_s, ticket.sent_at_s = self._heard_at_s, now_s
        known = self._known[action.replica_id]
        ticket.area = known.changed(+1, now_s)
        ticket.chosen.set_result(action.replica_id)
        ticket.chosen = None
        if self._claims is None:
            self._claim(_CLAIM_S)

    def _cancel(self, action: Cancel) -> None:
        """Serve stops what it has sent by itself."""

    def _refuse(self, action: Refuse) -> None:
        ticket = self._tickets.pop(action.call_id, None)
        if ticket is not None and ticket.chosen is not None and not ticket.chosen.done():
            self._workflows.leave(ticket.call)
            ticket.over = True
            ticket.chosen.set_exception(NoReplica(f"{action.reason}: {action.detail}"))
            ticket.chosen = None

    def _implied(self, ticket: Ticket, known: KnownReplica) -> float:
        """The work that a call of this time was, at the pace that the replica has shown."""
        profile = known.replica.profile
        fixed_s = profile.call_base_s + profile.prefill_token_s * ticket.call.prompt_tokens
        return max(
            1.0, ((ticket.took_s or 0.0) - fixed_s) / (profile.step_base_s + profile.decode_seq_s * ticket.batch)
        )

    def _signal(self, replica_id: str, running: int, waiting: int, kv_usage: float, at_s: float) -> None:
        if replica_id in self._known:
            self._shell.post(
                SignalReported(
                    replica_id=replica_id,
                    running=running,
                    waiting=waiting,
                    kv_usage=kv_usage,
                    measured_at_s=at_s,
                )
            )

    def _learnt(self, known: KnownReplica) -> None:
        """Tell the agent how fast the replica is, and what is thought of those of which nobody knows yet."""
        if known.calls < _ENOUGH:
            return
        self._describe(known, known.profile())
        if unknown := [one for one in self._known.values() if one.calls < _ENOUGH]:
            best = self._fastest() or self._first
            for one in unknown:
                self._describe(one, best)

    def _fastest(self) -> EngineProfile | None:
        """The profile of the fastest replica that is known: one that is not is tried as if it were as fast."""
        known = [one.profile() for one in self._known.values() if one.calls >= _ENOUGH]
        return min(known, key=lambda profile: profile.step_base_s + profile.decode_seq_s, default=None)

    def _describe(self, known: KnownReplica, profile: EngineProfile) -> None:
        profile = msgspec.structs.replace(profile, model=self.deployment, max_batch=known.replica.profile.max_batch)
        self._tell_profile(known, profile)

    def _tell_profile(self, known: KnownReplica, profile: EngineProfile) -> None:
        if differs(known.replica.profile, profile):
            known.replica = msgspec.structs.replace(known.replica, profile=profile)
            self._shell.post(ReplicaChanged(replica=known.replica, state="ready"))

    def _tell_workflow(self, message: Message, at_s: float) -> None:
        """An end counts as of the last answer, which is a while ago; nothing that must be done follows from it."""
        if isinstance(message, WorkflowEnded):
            self._switchboard.deliver(message, at_s)
        else:
            self._shell.post(message)

    def _observe(self, message: Message, now_s: float) -> None:
        self._heard_at_s = now_s
        if type(message) is DecisionMade and self._decisions is not None:
            self._decisions.write(message.decision)
        elif type(message) is DemandReported:
            with suppress(Exception):
                self._on_report(message)

"""How a router finds a replica for one call, or finds that the call had better wait."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from swarmx.agents.admission import Punctuality, Refusal, too_late
from swarmx.agents.calls import CallState
from swarmx.agents.choice import second_of
from swarmx.agents.objective import Objective, parameters_in
from swarmx.agents.orders import ORDERS, Key
from swarmx.agents.pool import Pool
from swarmx.agents.workflow_book import WorkflowBook
from swarmx.core.fleet import CallView, Choice, FleetView, Ints
from swarmx.core.messages import AlertRaised, DecisionMade
from swarmx.core.nouns import Decision, SeenWorkflow
from swarmx.core.ports import Policy


class Placed(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The replica for a call, and how the policy came to it; `cached_tokens` of its prompt are expected there."""

    columns: Ints
    about: CallView
    view: FleetView
    choice: Choice
    policy: Policy
    alerts: Sequence[AlertRaised]

    @property
    def column(self) -> int:
        """The column of the replica in the pool."""
        return int(self.columns[self.choice.index])

    @property
    def cached_tokens(self) -> float:
        return float(self.view.cached_tokens[self.choice.index])


class Placing:
    """Shows the policy in force a call and the replicas that may take it.

    `late_binding`: only replicas with room may take one. A call is held back for a busy replica, where the policy
    wants that, for `hold_limit_s` at most, and only while some replica is busy: when that one has done, it is asked
    again.
    """

    def __init__(
        self,
        objective: Objective,
        book: WorkflowBook,
        *,
        late_binding: bool,
        hold_limit_s: float,
        rng: np.random.Generator,
    ) -> None:
        self._objective = objective
        self._book = book
        self._late_binding = late_binding
        self._hold_limit_s = hold_limit_s
        self._rng = rng
        self._past: defaultdict[str, Punctuality] = defaultdict(Punctuality)

    def key(self, state: CallState, now_s: float) -> Key:
        """The place of the call in the order of the policy, from now on."""
        call = state.call
        workflow = self._book.view(call, state.path, state.ready_at_s, now_s)
        return ORDERS[self._objective.policy.order](workflow, now_s)

    def place(self, state: CallState, pool: Pool, ahead: int, now_s: float) -> Placed | Refusal | None:
        """None: the call waits. `ahead` calls that wait come before it. A call that will be late is not placed."""
        columns = pool.open(state.tried)
        if len(columns) == 0:
            return None
        if self.may_hold and now_s < self._until_s(state):
            every = pool.eligible(state.tried)
            placed = self._ask(state, pool, every, ahead, now_s)
            choice, view = placed.choice, placed.view
            if not (choice.hold or view.is_full(choice.index)):
                return self._late(state, choice, now_s) or placed
            if (view.in_flight > 0).any():
                return self._late(state, choice, now_s)
        placed = self._ask(state, pool, columns, ahead, now_s)
        return self._late(state, placed.choice, now_s) or placed

    def hopeless(self, state: CallState, pool: Pool, ahead: int, now_s: float) -> Refusal | None:
        """Whether a call that has to wait will be late wherever it goes, by the policy's word on full replicas."""
        every = pool.eligible(state.tried)
        if state.call.deadline_at_s is None or len(every) == 0:
            return None
        return self._late(state, self._ask(state, pool, every, ahead, now_s).choice, now_s)

    def took(self, state: CallState, now_s: float) -> None:
        """The call was answered."""
        self._past[state.call.model].took(state, now_s)

    def held_until_s(self, states: Iterable[CallState], now_s: float) -> float | None:
        """When the patience with a policy that holds these calls back, though there is room, ends for the first."""
        return min((until_s for state in states if (until_s := self._until_s(state)) > now_s), default=None)

    def _until_s(self, state: CallState) -> float:
        return state.ready_at_s + self._hold_limit_s

    @property
    def may_hold(self) -> bool:
        """Whether the policy in force may let calls wait although there is room."""
        return self._late_binding and self._objective.policy.waits

    def _late(self, state: CallState, choice: Choice, now_s: float) -> Refusal | None:
        if state.call.deadline_at_s is None:
            return None
        return too_late(state, choice, self._past[state.call.model], now_s)

    def _ask(self, state: CallState, pool: Pool, columns: Ints, ahead: int, now_s: float) -> Placed:
        call = state.call
        view = pool.view(columns, now_s, call.prefix)
        about = CallView(
            call=call,
            forecast=state.forecast,
            workflow=self._book.view(call, state.path, state.ready_at_s, now_s),
            now_s=now_s,
            waited_s=now_s - state.ready_at_s,
            ahead=ahead,
            home=pool.home(call.session, columns) if call.session else None,
        )
        choice, policy, alerts = self._objective.choose(about, view, self._rng)
        if state.foreseen_s is None and choice.expected_s is not None:
            state.foreseen_s = about.waited_s + choice.expected_s
        return Placed(columns=columns, about=about, view=view, choice=choice, policy=policy, alerts=alerts)

    def decision(self, state: CallState, pool: Pool, placed: Placed, now_s: float) -> DecisionMade:
        """What the decision log keeps of it: no names of the prompt's beginnings, which are many."""
        choice, policy, about, workflow = placed.choice, placed.policy, placed.about, placed.about.workflow
        second, ids = second_of(choice), pool.roster.replica_ids
        call = msgspec.structs.replace(state.call, prefix=()) if state.call.prefix else state.call
        parameters = self._objective.parameters if policy is self._objective.policy else parameters_in(policy)
        return DecisionMade(
            decision=Decision(
                call=call,
                attempt=state.attempt,
                at_s=now_s,
                policy=policy.name,
                parameters=parameters,
                replica_id=ids[placed.column],
                runner_up=None if second is None else ids[placed.columns[second]],
                forecast=state.forecast,
                candidates=pool.roster.candidates(placed.columns, placed.view, choice, second),
                note="retry" if state.attempt > 1 else "",
                waited_s=about.waited_s,
                ahead=about.ahead,
                home=None if about.home is None else ids[placed.columns[about.home]],
                workflow=SeenWorkflow(
                    age_s=workflow.age_s,
                    target_s=workflow.target_s,
                    remaining_s=workflow.remaining_s,
                    attained_s=workflow.attained_s,
                    attained_work=workflow.attained_work,
                    calls=workflow.calls,
                    others_s=workflow.others_s,
                    usual_s=workflow.usual_s,
                    usual_call_s=workflow.usual_call_s,
                ),
            )
        )

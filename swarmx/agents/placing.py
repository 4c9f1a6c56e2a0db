"""How a router finds a replica for one call, or finds that the call had better wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from swarmx.agents.calls import CallState
from swarmx.agents.choice import second_of
from swarmx.agents.objective import Objective, parameters_in
from swarmx.agents.orders import ORDERS, Key
from swarmx.agents.pool import Pool
from swarmx.agents.workflow_book import WorkflowBook
from swarmx.core.fleet import CallView, Choice, FleetView, Ints
from swarmx.core.messages import AlertRaised, DecisionMade
from swarmx.core.nouns import Decision
from swarmx.core.ports import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The replica for a call, and how the policy came to it; `cached_tokens` of its prompt are expected there."""

    columns: Ints
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

    def key(self, state: CallState, now_s: float) -> Key:
        """The place of the call in the order of the policy, from now on."""
        call = state.call
        workflow = self._book.view(call.workflow_id, call.workflow_kind, state.path, state.ready_at_s, now_s)
        return ORDERS[self._objective.policy.order](workflow, now_s)

    def place(self, state: CallState, pool: Pool, ahead: int, now_s: float) -> Placed | None:
        """None: the call waits. `ahead` calls that wait come before it."""
        columns = pool.open(state.tried)
        if len(columns) == 0:
            return None
        may_hold = self._late_binding and self._objective.policy.waits
        if may_hold and now_s - state.ready_at_s <= self._hold_limit_s:
            every = pool.eligible(state.tried)
            placed = self._ask(state, pool, every, ahead, now_s)
            choice, view = placed.choice, placed.view
            full = view.in_flight[choice.index] >= view.max_batch[choice.index]
            if not (choice.hold or full):
                return placed
            if (view.in_flight > 0).any():
                return None
        return self._ask(state, pool, columns, ahead, now_s)

    def _ask(self, state: CallState, pool: Pool, columns: Ints, ahead: int, now_s: float) -> Placed:
        call = state.call
        view = pool.view(columns, now_s, call.prefix)
        about = CallView(
            call=call,
            forecast=state.forecast,
            workflow=self._book.view(call.workflow_id, call.workflow_kind, state.path, state.ready_at_s, now_s),
            now_s=now_s,
            waited_s=now_s - state.ready_at_s,
            ahead=ahead,
            home=pool.home(call.session, columns) if call.session else None,
        )
        choice, policy, alerts = self._objective.choose(about, view, self._rng)
        return Placed(columns=columns, view=view, choice=choice, policy=policy, alerts=alerts)

    def decision(self, state: CallState, pool: Pool, placed: Placed, now_s: float) -> DecisionMade:
        """What the decision log keeps of it: no names of the prompt's beginnings, which are many."""
        choice, policy = placed.choice, placed.policy
        second = second_of(choice)
        call = msgspec.structs.replace(state.call, prefix=()) if state.call.prefix else state.call
        parameters = self._objective.parameters if policy is self._objective.policy else parameters_in(policy)
        return DecisionMade(
            decision=Decision(
                call=call,
                attempt=state.attempt,
                at_s=now_s,
                policy=policy.name,
                parameters=parameters,
                replica_id=pool.replicas[placed.column].replica_id,
                runner_up=None if second is None else pool.replicas[placed.columns[second]].replica_id,
                forecast=state.forecast,
                candidates=pool.candidates(placed.columns, placed.view, choice, second),
                note="retry" if state.attempt > 1 else "",
            )
        )

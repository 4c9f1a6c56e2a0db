"""One snapshot of everything that people, the guard and the coordinator may look at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from swarmx.core.control import ControlView, ModelStatus, PolicyStatus, Proposal, ReplicaStatus
from swarmx.core.nouns import CallKind, Decision, ReplicaState
from swarmx.core.scaling import ScalePlan
from swarmx.runtime.clock import Clock
from swarmx.runtime.figures import Figures
from swarmx.runtime.fleet_book import FleetBook

_DEMAND_FRESH_S = 10.0


class Overview:
    """Reads the books of others. The policies, `bounds` (lowest, highest, limit; None where a model cannot be scaled),
    `startup_s`, `next_cost` and `last_plan` are asked of the agents, `proposals` and `decisions` of the store.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        book: FleetBook,
        figures: Figures,
        routing: Callable[[], PolicyStatus],
        scaling: Callable[[], PolicyStatus],
        bounds: Callable[[str], tuple[int, int, int] | None],
        startup_s: Callable[[str], float | None],
        next_cost: Callable[[str], float | None],
        last_plan: Callable[[str], ScalePlan | None],
        proposals: Callable[[], Awaitable[Sequence[Proposal]]],
        decisions: Callable[[str], Awaitable[Sequence[Decision]]],
        workflows_running: Callable[[], int],
    ) -> None:
        self._clock = clock
        self._book = book
        self._figures = figures
        self._routing = routing
        self._scaling = scaling
        self._bounds = bounds
        self._startup_s = startup_s
        self._next_cost = next_cost
        self._last_plan = last_plan
        self._proposals = proposals
        self._decisions = decisions
        self._workflows_running = workflows_running

    async def view(self, call_ids: Sequence[str] = ()) -> ControlView:
        """Everything as it is now, with the decisions about these calls. Raises StoreError."""
        proposals = sorted(await self._proposals(), key=lambda proposal: proposal.at_s)
        decisions = {call_id: tuple(await self._decisions(call_id)) for call_id in call_ids}
        # From here on nothing is awaited, so that all of it is of the same moment.
        now_s = self._clock.now_s()
        replicas = self._book.statuses()
        workflows = self._figures.workflows(now_s)
        return ControlView(
            at_s=now_s,
            window_s=workflows.window_s,
            models={
                name: self._model(name, kind, [row for row in replicas if row.model == name], now_s)
                for name, kind in sorted(self._figures.models().items())
            },
            replicas={row.replica_id: row for row in replicas},
            routing=self._routing(),
            scaling=self._scaling(),
            workflows_running=self._workflows_running(),
            workflows_ended=workflows.ended,
            workflow_p95_s=workflows.p95_s,
            alerts=tuple(self._figures.alerts),
            plans=tuple(self._figures.plans),
            proposals=tuple(proposals),
            decisions=decisions,
        )

    def _model(self, name: str, kind: CallKind, replicas: Sequence[ReplicaStatus], now_s: float) -> ModelStatus:
        figures = self._figures.model(name, now_s)
        in_flight = sum(row.in_flight for row in replicas)
        bounds = self._bounds(name)
        plan = self._last_plan(name)
        return ModelStatus(
            model=name,
            kind=kind,
            ready=_count(replicas, "ready"),
            starting=_count(replicas, "starting"),
            cordoned=_count(replicas, "cordoned"),
            draining=_count(replicas, "draining"),
            in_flight=in_flight,
            waiting=self._waiting(name, in_flight, now_s),
            window_s=figures.window_s,
            arrivals_per_s=figures.arrivals_per_s,
            ended=figures.ended,
            failed=figures.failed,
            p50_s=figures.p50_s,
            p95_s=figures.p95_s,
            wait_p95_s=figures.wait_p95_s,
            cost_rate=self._figures.cost_rate(name),
            min_replicas=None if bounds is None else bounds[0],
            max_replicas=None if bounds is None else bounds[1],
            limit=None if bounds is None else bounds[2],
            wanted=None if plan is None else plan.wanted,
            start_s=self._startup_s(name),
            next_cost=self._next_cost(name),
        )

    def _waiting(self, name: str, in_flight: int, now_s: float) -> int:
        """By the router's last word; an old one says nothing of a model that has come to rest."""
        reported = self._figures.demand(name)
        if reported is None:
            return 0
        at_s, demand = reported
        return demand.waiting if in_flight or now_s - at_s < _DEMAND_FRESH_S else 0


def _count(replicas: Sequence[ReplicaStatus], state: ReplicaState) -> int:
    return sum(row.state == state for row in replicas)

"""The scaler agent: keeps as many replicas of each model as its policy wants, within bounds, limits and budget."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, assert_never

import msgspec

from swarmx.agents.scaling import DEFAULT_SCALING_POLICY, make_scaling_policy, scaling_parameters_of
from swarmx.agents.scaling.reports import Reports
from swarmx.agents.scaling.steps import Bounds, Wish, bounds_within, grow, ideal, shrink
from swarmx.agents.scaling.supply import Held, Measure, Supply
from swarmx.core.actions import Deploy, Drain, StartTimer
from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    DemandReported,
    DrainNoticed,
    FirstToken,
    ForecastRefined,
    ForecastScored,
    Message,
    PolicyChanged,
    PredictorReady,
    ReplicaChanged,
    RetrainEnded,
    ScalePlanned,
    ScaleRequested,
    ScalingPolicyChanged,
    ServiceCurvePublished,
    SignalReported,
    TimerFired,
    TokensProgressed,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.nouns import ReplicaGroup
from swarmx.core.ports import Output, ScalingPolicy
from swarmx.core.scaling import PlanReason, ScalePlan, ScaleView, Target

TIMER = "plan"
_USUAL_CALLS = 16.0  # on a replica, for a policy that has no such parameter


class ScalerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What can be scaled, by which policy, and how steadily. Times in seconds.

    `threshold` is the change, as a share of what is there, that is not worth a start or a stop. `budget` bounds the
    sum of the device weights of all replicas that the scaler has started. A start may take `start_patience` times as
    long as starts of its group took so far, and at least `start_floor_s`. `startups` are start-up times in seconds by
    group, as an earlier life saw them.
    """

    groups: tuple[ReplicaGroup, ...] = ()
    policy: str = DEFAULT_SCALING_POLICY
    parameters: dict[str, float] = {}
    every_s: float = 2.0
    up_cooldown_s: float = 4.0
    down_cooldown_s: float = 300.0
    threshold: float = 0.1
    drain_s: float = 60.0
    budget: float | None = None
    start_patience: float = 4.0
    start_floor_s: float = 30.0
    backoff_most_s: float = 300.0
    alert_every_s: float = 30.0
    startups: dict[str, list[float]] = {}


@dataclass(slots=True, kw_only=True)
class _Model:
    """What the scaler remembers of one model."""

    name: str
    supply: Supply
    bounds: Bounds
    reports: Reports = field(default_factory=Reports)
    wishes: deque[tuple[float, float]] = field(default_factory=deque)  # (when, replicas), a down-cooldown's worth
    requested: tuple[int, float] | None = None  # (replicas, until when)
    grown_at_s: float = -math.inf
    alerted_at_s: float = -math.inf
    plans_over: int = 0
    plan: ScalePlan | None = None

    def order(self, now_s: float) -> int | None:
        """How many replicas somebody asked for, as long as that holds."""
        if self.requested is not None and now_s >= self.requested[1]:
            self.requested = None
        return None if self.requested is None else self.requested[0]


class ScalerAgent:
    """The four parts: the routers' reports carry the forecasts, `_models` is its memory, `policy` is its objective,
    and `actions` are its tools.

    Begins to plan with the first TimerFired(`TIMER`). What a report, a replica or an operator says is only noted; but a
    loss, the notice of one, an order and new bounds are acted on at once.
    """

    name = "scaler"
    listens: frozenset[type] = frozenset(
        {DemandReported, ReplicaChanged, DrainNoticed, BoundsChanged, ScaleRequested, ScalingPolicyChanged, TimerFired}
    )
    actions: frozenset[type] = frozenset({Deploy, Drain, StartTimer})

    def __init__(self, settings: ScalerSettings) -> None:
        self.settings = settings
        self.policy: ScalingPolicy = make_scaling_policy(settings.policy, settings.parameters)
        self.parameters = _parameters(self.policy)
        self._policy_alerted_at_s = -math.inf
        self._numbers = {group.group_id: 0 for group in settings.groups}  # of the next replica of each group
        self._models: dict[str, _Model] = {}
        for model in dict.fromkeys(group.model for group in settings.groups):
            groups = [group for group in settings.groups if group.model == model]
            least, most, limit = (
                sum(getattr(group, name) for group in groups) for name in ("min_replicas", "max_replicas", "limit")
            )
            supply, bounds = Supply(groups, settings.startups), bounds_within(limit, least, most)
            self._models[model] = _Model(name=model, supply=supply, bounds=bounds)

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Rebuild the agent that wrote a journal; `config` is `msgspec.to_builtins(settings)`."""
        return cls(msgspec.convert(config, ScalerSettings))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that can be scaled."""
        return tuple(self._models)

    def bounds(self, model: str) -> Bounds | None:
        """None for a model that cannot be scaled; so it is with the three below."""
        known = self._models.get(model)
        return None if known is None else known.bounds

    def startup_s(self, model: str) -> float | None:
        """How long the replica that would be started next takes to be ready, P90."""
        known = self._models.get(model)
        return None if known is None else known.supply.startup_s(known.supply.cheapest(self._measure(known))[0])

    def next_cost(self, model: str) -> float | None:
        """The device weight of the replica that would be started next."""
        known = self._models.get(model)
        return None if known is None else known.supply.cheapest(self._measure(known))[0].profile.cost_weight

    def last_plan(self, model: str) -> ScalePlan | None:
        """The newest plan, whether it changed anything or not; also None before the first."""
        known = self._models.get(model)
        return None if known is None else known.plan

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        match message:
            case DemandReported():
                if (model := self._models.get(message.model)) is not None:
                    model.reports.add(message, now_s)
                return ()
            case ReplicaChanged():
                return self._replica_changed(message, now_s)
            case DrainNoticed():
                return self._noticed(message, now_s)
            case BoundsChanged():
                return self._change_bounds(message, now_s)
            case ScaleRequested():
                return self._request(message, now_s)
            case ScalingPolicyChanged():
                return self._change_policy(message)
            case TimerFired():
                return self._tick(now_s) if message.key == TIMER else ()
            case (
                CallReady()
                | FirstToken()
                | TokensProgressed()
                | CallFinished()
                | CallFailed()
                | CallCancelled()
                | SignalReported()
                | PolicyChanged()
                | WorkflowSubmitted()
                | WorkflowEnded()
                | ScalePlanned()
                | ForecastRefined()
                | ServiceCurvePublished()
                | ForecastScored()
                | RetrainEnded()
                | PredictorReady()
                | DecisionMade()
                | AlertRaised()
            ):
                return ()
            case _:
                assert_never(message)

    def _tick(self, now_s: float) -> Sequence[Output]:
        outputs: list[Output] = [StartTimer(key=TIMER, at_s=now_s + self.settings.every_s)]
        for model in self._models.values():
            model.reports.sample()
            outputs += [*self._drain_due(model, now_s), *self._give_up_overdue(model, now_s)]
            outputs += self._plan(model, now_s, on_tick=True)
        return outputs

    def _replica_changed(self, message: ReplicaChanged, now_s: float) -> Sequence[Output]:
        replica = message.replica
        group_id, _, number = replica.replica_id.rpartition("-")
        if group_id in self._numbers and number.isdecimal():
            self._numbers[group_id] = max(self._numbers[group_id], int(number) + 1)
        model = self._models.get(replica.model)
        if model is None:
            return ()
        held = model.supply.held.get(replica.replica_id)
        match model.supply.changed(replica, message.state, now_s, group_id=message.group_id):
            case "started" if held is not None and held.group is not None:
                model.supply.started(held.group)
            case "failed" if held is not None and held.group is not None:
                self._back_off(model, held.group, now_s)
            case "lost" if model.plan is not None:
                model.grown_at_s = -math.inf
                return self._plan(model, now_s)
        return ()

    def _noticed(self, message: DrainNoticed, now_s: float) -> Sequence[Output]:
        """Start what stands in for the replica at once; it serves until that is up, or its time is short."""
        if (model := next((m for m in self._models.values() if message.replica_id in m.supply.held), None)) is None:
            return ()
        model.supply.noticed(message.replica_id, message.deadline_at_s, now_s)
        model.grown_at_s = -math.inf
        return [*([] if model.plan is None else self._plan(model, now_s)), *self._drain_due(model, now_s)]

    def _drain_due(self, model: _Model, now_s: float) -> list[Output]:
        return [self._drain(held, now_s) for held in model.supply.due(now_s, drain_s=self.settings.drain_s)]

    def _change_bounds(self, message: BoundsChanged, now_s: float) -> Sequence[Output]:
        model = self._models.get(message.model)
        if model is None:
            return ()
        model.bounds = bounds_within(model.bounds.limit, message.min_replicas, message.max_replicas)
        return () if model.plan is None else self._plan(model, now_s)

    def _request(self, message: ScaleRequested, now_s: float) -> Sequence[Output]:
        model = self._models.get(message.model)
        if model is None:
            return ()
        model.requested = (max(0, message.replicas), now_s + message.hold_s)
        return () if model.plan is None else self._plan(model, now_s)

    def _change_policy(self, message: ScalingPolicyChanged) -> Sequence[Output]:
        try:
            policy = make_scaling_policy(message.policy, message.parameters)
        except ConfigError:  # from a newer version, say: the policy in force stays
            return (AlertRaised(kind="policy_failed", subject=message.policy),)
        self.policy, self.parameters = policy, _parameters(policy)
        return ()

    def _give_up_overdue(self, model: _Model, now_s: float) -> list[Output]:
        outputs: list[Output] = []
        patience, floor_s = self.settings.start_patience, self.settings.start_floor_s
        for held in model.supply.overdue(now_s, patience=patience, floor_s=floor_s):
            if not held.is_heard_of or held.group is None:  # nobody will say that it is gone
                model.supply.forget(held.replica_id)
            if held.is_leaving or held.group is None:
                continue
            self._back_off(model, held.group, now_s)
            outputs += [
                self._drain(held, now_s),
                AlertRaised(kind="replica_failed", subject=held.replica_id, value=now_s - held.since_s),
            ]
        return outputs

    def _back_off(self, model: _Model, group: ReplicaGroup, now_s: float) -> None:
        model.supply.failed(group, now_s, first_s=self.settings.every_s, most_s=self.settings.backoff_most_s)

    def _plan(self, model: _Model, now_s: float, *, on_tick: bool = False) -> list[Output]:
        """Compare what is wanted with what is there, and start or drain replicas for the difference."""
        measure = self._measure(model)
        view = self._view(model, measure, now_s)
        target, alerts = self._ask(view, now_s)
        if on_tick:
            self._remember_wish(model, view.capacity, target.replicas, now_s)
        wish = Wish(
            replicas=target.replicas,
            most_lately=max(replicas for _, replicas in model.wishes),
            order=model.order(now_s),
            bounds=model.bounds,
            reference=view.profile,
            measure=measure,
            threshold=self.settings.threshold,
            is_cooling=now_s < model.grown_at_s + self.settings.up_cooldown_s,
        )
        count = ideal(model.supply, wish)
        deploys: list[Deploy] = []
        lacking = grow(model.supply, wish, lambda: self._start(model, measure, deploys, now_s))
        leaving, kept = ([], None) if deploys else shrink(model.supply, wish)
        drains = [self._drain(held, now_s) for held in leaving]
        last, model.plan = model.plan, self._written(view, wish, target, count, deploys, drains, lacking or kept)
        if on_tick:
            alerts += self._alert_at_max(model, count, wish.wanted, now_s)
        told = deploys or drains or last is None or last.reason != model.plan.reason
        return [*deploys, *drains, *([ScalePlanned(plan=model.plan)] if told else []), *alerts]

    def _written(
        self,
        view: ScaleView,
        wish: Wish,
        target: Target,
        count: int,
        deploys: Sequence[Deploy],
        drains: Sequence[Drain],
        hindrance: PlanReason | None,
    ) -> ScalePlan:
        reason: PlanReason
        if wish.order is not None:
            reason = "requested" if deploys or drains or hindrance is None else hindrance
        else:
            reason = "grow" if deploys else "shrink" if drains else hindrance or "steady"
        least, most, _ = wish.bounds
        return ScalePlan(
            model=view.model,
            at_s=view.now_s,
            policy=self.policy.name,
            parameters=self.parameters,
            have=view.capacity,
            wanted=wish.wanted,
            target=min(max(count, least), most),
            min_replicas=least,
            max_replicas=most,
            horizon_s=view.horizon_s,
            terms={"arrivals_per_s": view.arrivals_per_s, **target.terms},
            deploys=tuple(action.replica_id for action in deploys),
            drains=tuple(action.replica_id for action in drains),
            reason=reason,
        )

    def _remember_wish(self, model: _Model, have: float, replicas: float, now_s: float) -> None:
        """What was there before the first wish counts as one: a fresh scaler does not begin with an end."""
        if not model.wishes:
            model.wishes.append((now_s, have))
        model.wishes.append((now_s, replicas))
        while model.wishes[0][0] < now_s - self.settings.down_cooldown_s:
            model.wishes.popleft()

    def _start(
        self, model: _Model, measure: Measure, deploys: list[Deploy], now_s: float
    ) -> EngineProfile | PlanReason:
        """Order one replica from the cheapest group that can start one; or say why none can."""
        supply = model.supply
        group = next((g for g in supply.cheapest(measure) if self._can_start(model, g, now_s)), None)
        if group is None:
            return "backoff" if any(supply.is_backing_off(g, now_s) for g in supply.groups) else "limit"
        replica_id = f"{group.group_id}-{self._numbers[group.group_id]}"
        self._numbers[group.group_id] += 1
        supply.asked_for(replica_id, group, now_s)
        model.grown_at_s = now_s
        deploys.append(Deploy(replica_id=replica_id, group_id=group.group_id))
        return group.profile

    def _drain(self, held: Held, now_s: float) -> Drain:
        held.is_leaving, held.drained_at_s = True, now_s
        patience_s = 0.0 if held.state == "starting" else self.settings.drain_s
        return Drain(replica_id=held.replica_id, deadline_at_s=min(now_s + patience_s, max(now_s, held.leaves_at_s)))

    def _can_start(self, model: _Model, group: ReplicaGroup, now_s: float) -> bool:
        supply = model.supply
        return supply.has_room(group) and self._affords(group) and not supply.is_backing_off(group, now_s)

    def _affords(self, group: ReplicaGroup) -> bool:
        spent = sum(model.supply.cost() for model in self._models.values())
        return self.settings.budget is None or spent + group.profile.cost_weight <= self.settings.budget + 1e-9

    def _measure(self, model: _Model) -> Measure:
        calls = self.parameters.get("target_in_flight", _USUAL_CALLS)
        return Measure(calls=calls, work=max(1.0, model.reports.work_per_call))

    def _view(self, model: _Model, measure: Measure, now_s: float) -> ScaleView:
        supply, reports = model.supply, model.reports
        groups = supply.cheapest(measure)
        following = next((group for group in groups if self._can_start(model, group, now_s)), groups[0])
        horizon_s = supply.startup_s(following) + self.settings.every_s
        upcoming_mean, upcoming_p90 = reports.upcoming(horizon_s)
        return ScaleView(
            model=model.name,
            now_s=now_s,
            horizon_s=horizon_s,
            in_flight=reports.in_flight,
            waiting=reports.waiting,
            work_left=reports.work_left,
            work_per_call=reports.work_per_call,
            arrivals_per_s=reports.arrivals_per_s,
            burst_per_s=reports.burst_per_s,
            upcoming_mean=upcoming_mean,
            upcoming_p90=upcoming_p90,
            fresh_mean=reports.fresh(horizon_s),
            capacity=supply.capacity(groups[0].profile, measure),
            profile=groups[0].profile,  # whether it has room or not: a unit that changed would never let a plan settle
        )

    def _ask(self, view: ScaleView, now_s: float) -> tuple[Target, list[Output]]:
        """Ask the policy; one that raises or answers nonsense is overruled: what is there stays."""
        try:
            target = self.policy.target(view)
            sound = math.isfinite(target.replicas) and target.replicas >= 0.0
        except Exception:  # noqa: BLE001  # a policy is a plug-in: whatever it raises must not stop the scaler
            sound = False
        if sound:
            return target, []
        if now_s < self._policy_alerted_at_s + self.settings.alert_every_s:
            return Target(replicas=view.capacity), []
        self._policy_alerted_at_s = now_s
        return Target(replicas=view.capacity), [AlertRaised(kind="policy_failed", subject=self.policy.name)]

    def _alert_at_max(self, model: _Model, count: int, wanted: float, now_s: float) -> list[Output]:
        """A wish beyond the bounds in two plans in a row is told, and told again from time to time."""
        model.plans_over = model.plans_over + 1 if count > model.bounds.max_replicas else 0
        if model.plans_over < 2 or now_s < model.alerted_at_s + self.settings.alert_every_s:
            return []
        model.alerted_at_s = now_s
        return [AlertRaised(kind="at_max", subject=model.name, value=wanted)]


def _parameters(policy: ScalingPolicy) -> dict[str, float]:
    return {name: float(getattr(policy, name)) for name in scaling_parameters_of(policy.name)}

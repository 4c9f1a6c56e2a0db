"""Replica groups and demand to test a scaler with, and a world in which replicas take their time to start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmx.agents.demand import HORIZONS_S
from swarmx.agents.scaler import ScalerAgent, ScalerSettings
from swarmx.core.actions import Action, Deploy, Dispatch, Drain
from swarmx.core.engine import EngineProfile
from swarmx.core.messages import CallFinished, DemandReported, Message, ReplicaChanged, ScalePlanned, TimerFired
from swarmx.core.nouns import Replica, ReplicaGroup, ReplicaState
from swarmx.core.scaling import ScalePlan
from tests.agents.worlds import FAST, a_profile

PLAN = TimerFired(key="plan")


def a_group(group_id: str = "g", *, profile: EngineProfile = FAST, **about: Any) -> ReplicaGroup:
    usual = {"model": "m", "kind": "llm", "min_replicas": 0, "max_replicas": 8, "limit": 8, "start_s": 10.0}
    return ReplicaGroup(
        **{"group_id": group_id, "device": profile.device, "provider": "test", "profile": profile} | usual | about
    )


def demand(calls: int = 0, *, model: str = "m", window_s: float = 2.0, **about: Any) -> DemandReported:
    """So many calls in flight; nothing to come unless said."""
    nothing = (0.0,) * len(HORIZONS_S)
    usual = {
        "arrived": 0,
        "arrived_work": 0.0,
        "finished": 0,
        "in_flight": calls,
        "waiting": 0,
        "work_left": 100.0 * calls,
        "work_per_call": 200.0,
        "horizons_s": HORIZONS_S,
        "upcoming_mean": nothing,
        "upcoming_p90": nothing,
        "fresh_mean": nothing,
    }
    return DemandReported(**{"model": model, "window_s": window_s} | usual | about)


def of_group(replica_id: str, state: ReplicaState, group: ReplicaGroup) -> ReplicaChanged:
    return ReplicaChanged(
        replica=Replica(
            replica_id=replica_id,
            model=group.model,
            kind=group.kind,
            device=group.device,
            url="http://r",
            profile=group.profile,
            provider=group.provider,
            emulated=True,
        ),
        state=state,
    )


@dataclass(slots=True)
class Bench:
    """A scaler on its own, ticked by hand; replicas change when the test says so."""

    agent: ScalerAgent
    now_s: float = 0.0
    plans: list[ScalePlan] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def say(self, *messages: Message) -> list[Any]:
        """Everything that it answers but its timer; plans go to `plans`."""
        said = [output for message in messages for output in self.agent.handle(message, self.now_s)]
        self.plans += [output.plan for output in said if isinstance(output, ScalePlanned)]
        self.outputs += said
        return [output for output in said if not isinstance(output, ScalePlanned) and "StartTimer" not in repr(output)]

    def tick(self, calls: int | None = None, *, after_s: float = 2.0, **about: Any) -> list[Any]:
        """A report of demand, if given, and a plan."""
        self.now_s += after_s
        reports = [] if calls is None else [demand(calls, window_s=after_s, **about)]
        return self.say(*reports, PLAN)

    def become(self, state: ReplicaState, *replica_ids: str) -> list[Any]:
        groups = {group.group_id: group for group in self.agent.settings.groups}
        return self.say(*(of_group(i, state, groups[i.rpartition("-")[0]]) for i in replica_ids))

    @property
    def reason(self) -> str:
        plan = self.agent.last_plan("m")
        assert plan is not None
        return plan.reason


def a_bench(*groups: ReplicaGroup, **settings: Any) -> Bench:
    """Quick and simple: eight calls a replica, no cooldowns, no threshold."""
    usual = {
        "policy": "target_tracking",
        "parameters": {"target_in_flight": 8.0},
        "up_cooldown_s": 0.0,
        "down_cooldown_s": 0.0,
        "threshold": 0.0,
    }
    return Bench(ScalerAgent(ScalerSettings(**{"groups": groups or (a_group(),)} | usual | settings)))


def a_bench_with(count: int, *groups: ReplicaGroup, **settings: Any) -> Bench:
    """So many replicas of the first group are ready, and wanted."""
    bench = a_bench(*groups, **settings)
    bench.become("ready", *deployed(bench.tick(8 * count)))
    return bench


def deployed(outputs: Iterable[Any]) -> list[str]:
    return [output.replica_id for output in outputs if isinstance(output, Deploy)]


def drained(outputs: Iterable[Any]) -> list[str]:
    return [output.replica_id for output in outputs if isinstance(output, Drain)]


class SlowStarts:
    """Replicas start after `starts_s[i]` seconds, in turn (None: never), drain at once, answer in `call_s`."""

    def __init__(
        self, groups: Sequence[ReplicaGroup], starts_s: Sequence[float | None], *, call_s: float = 4.0
    ) -> None:
        self._groups: Mapping[str, ReplicaGroup] = {group.group_id: group for group in groups}
        self._starts_s = starts_s
        self._call_s = call_s
        self.deploys: list[tuple[float, str]] = []

    def perform(self, action: Action, now_s: float) -> Iterator[tuple[float, Message]]:
        match action:
            case Deploy():
                start_s = self._starts_s[len(self.deploys) % len(self._starts_s)]
                self.deploys.append((now_s, action.replica_id))
                yield 0.0, of_group(action.replica_id, "starting", self._groups[action.group_id])
                if start_s is not None:
                    yield start_s, of_group(action.replica_id, "ready", self._groups[action.group_id])
            case Drain():
                group = self._groups[action.replica_id.rpartition("-")[0]]
                yield 0.0, of_group(action.replica_id, "draining", group)
                yield 0.5, of_group(action.replica_id, "gone", group)
            case Dispatch():
                yield (
                    self._call_s,
                    CallFinished(
                        call_id=action.call_id,
                        attempt=action.attempt,
                        prompt_tokens=9,
                        cached_tokens=0,
                        work_done=100.0,
                    ),
                )
            case _:
                pass


SLOW = a_profile(speed=0.5, device="slow")

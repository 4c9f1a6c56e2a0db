"""How many replicas a Serve deployment should have, by the scaler agent; how they start and end is Serve's affair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from swarmx.agents.scaler import TIMER, ScalerAgent, ScalerSettings
from swarmx.agents.scaling import DEFAULT_SCALING_POLICY, make_scaling_policy
from swarmx.compat.ray_serve.options import options_of
from swarmx.core.actions import Deploy, Drain
from swarmx.core.engine import EngineProfile
from swarmx.core.messages import BoundsChanged, DemandReported, Message, ReplicaChanged, TimerFired
from swarmx.core.nouns import Replica, ReplicaGroup, ReplicaState

_GROUP = "serve"
_MOST = 10_000
_HORIZONS_S = (2.0, 256.0)


class PlannerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`policy_kwargs` of a Serve config file. Times in seconds.

    `policy` and `parameters` are those of the scaler agent; `start_s` is a first guess of how long a replica takes to
    start. `seconds_per_token` and `call_s` say what a call takes, about, before there is anything better to know.
    """

    policy: str = DEFAULT_SCALING_POLICY
    parameters: dict[str, float] = msgspec.field(default_factory=lambda: {"target_in_flight": 2.0})
    start_s: float = 10.0
    every_s: float = 1.0
    up_cooldown_s: float = 2.0
    down_cooldown_s: float = 60.0
    threshold: float = 0.1
    seconds_per_token: float = 0.02
    call_s: float = 0.0
    max_ongoing_requests: int = 100


def read_planner_options(given: Mapping[str, Any]) -> PlannerOptions:
    """The options, checked. Raises ConfigError."""
    options = options_of(PlannerOptions, given, "policy_kwargs")
    make_scaling_policy(options.policy, options.parameters)
    return options


class Planner:
    """The scaler agent over one deployment, told of replicas by their number alone.

    `plan` is called as often as one likes; the agent plans every `every_s`.
    """

    def __init__(self, deployment: str, options: PlannerOptions) -> None:
        self.deployment = deployment
        self.terms: dict[str, float] = {}
        self._options = options
        self._profile = EngineProfile(
            model=deployment,
            device="ray",
            step_base_s=options.seconds_per_token,
            call_base_s=options.call_s,
            max_batch=options.max_ongoing_requests,
        )
        self._agent: ScalerAgent | None = None
        self._states: dict[str, ReplicaState] = {}
        self._bounds = (-1, -1)
        self._next_at_s = 0.0

    def plan(
        self, now_s: float, *, current: int, target: int, least: int, most: int, demand: Sequence[DemandReported]
    ) -> int:
        """How many there should be: `current` run, Serve goes for `target`, and `least` to `most` are allowed.

        `demand` are reports that were not handed in before.
        """
        if self._agent is None:
            self._begin(max(current, target), now_s)
        self._follow(current, now_s)
        if (least, most) != self._bounds:
            self._bounds = (least, most)
            self._tell(BoundsChanged(model=self.deployment, min_replicas=least, max_replicas=most), now_s)
        for report in demand:
            self._tell(msgspec.structs.replace(report, model=self.deployment), now_s)
        if now_s >= self._next_at_s:
            self._next_at_s = now_s + self._options.every_s
            self._tick(now_s)
        return min(max(len(self._states), least), most)

    def load(self, *, running: float, waiting: float, window_s: float) -> DemandReported:
        """A report made of Serve's own metrics, where no SwarmX router reports: what is there, and no outlook."""
        calls = running + waiting
        return DemandReported(
            model=self.deployment,
            window_s=window_s,
            arrived=0,
            arrived_work=0.0,
            finished=0,
            in_flight=round(running),
            waiting=round(waiting),
            work_left=calls,
            work_per_call=1.0,
            horizons_s=_HORIZONS_S,
            upcoming_mean=(0.0, 0.0),
            upcoming_p90=(0.0, 0.0),
            fresh_mean=(0.0, 0.0),
        )

    def _begin(self, there: int, now_s: float) -> None:
        group = ReplicaGroup(
            group_id=_GROUP,
            model=self.deployment,
            kind="llm",
            device="ray",
            provider="ray",
            profile=self._profile,
            min_replicas=there,
            max_replicas=max(there, 1),
            limit=_MOST,
            start_s=self._options.start_s,
        )
        self._agent = ScalerAgent(
            ScalerSettings(
                groups=(group,),
                policy=self._options.policy,
                parameters=self._options.parameters,
                every_s=self._options.every_s,
                up_cooldown_s=self._options.up_cooldown_s,
                down_cooldown_s=self._options.down_cooldown_s,
                threshold=self._options.threshold,
                start_patience=1e6,
            )
        )
        self._tick(now_s)  # it asks for those that are there: from now on they are its own
        for replica_id in list(self._states):
            self._say(replica_id, "cordoned", now_s)  # not from starting to ready: nobody saw them start
            self._say(replica_id, "ready", now_s)
        self._next_at_s = now_s

    def _follow(self, current: int, now_s: float) -> None:
        """As many are ready as run, the oldest first."""
        for number, replica_id in enumerate(list(self._states)):
            if number < current and self._states[replica_id] == "starting":
                self._say(replica_id, "ready", now_s)

    def _tick(self, now_s: float) -> None:
        self._tell(TimerFired(key=TIMER), now_s)

    def _tell(self, message: Message, now_s: float) -> None:
        if self._agent is None:
            return
        for output in self._agent.handle(message, now_s):
            if isinstance(output, Deploy):
                self._states[output.replica_id] = "starting"
            elif isinstance(output, Drain) and output.replica_id in self._states:
                self._say(output.replica_id, "draining", now_s)
                self._say(output.replica_id, "gone", now_s)
        plan = self._agent.last_plan(self.deployment)
        self.terms = {} if plan is None else {"have": plan.have, "wanted": plan.wanted, **plan.terms}

    def _say(self, replica_id: str, state: ReplicaState, now_s: float) -> None:
        replica = Replica(
            replica_id=replica_id,
            model=self.deployment,
            kind="llm",
            device="ray",
            url="",
            profile=self._profile,
            provider="ray",
            emulated=False,
        )
        if state == "gone":
            self._states.pop(replica_id, None)
        else:
            self._states[replica_id] = state
        self._tell(ReplicaChanged(replica=replica, state=state), now_s)

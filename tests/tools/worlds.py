"""A small world that tools act on: it does what messages and actions say, and shows itself as a ControlView."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swarmx.core.actions import Action, Cordon, Drain
from swarmx.core.control import Actor, ControlView, ModelStatus, PolicyStatus, Proposal, ReplicaStatus, Scalar, ToolCall
from swarmx.core.errors import ConfigError
from swarmx.core.messages import BoundsChanged, Message, PolicyChanged, ScaleRequested, ScalingPolicyChanged
from swarmx.core.nouns import Candidates, Decision, ReplicaState
from swarmx.tools.catalogue import Catalogue, ParameterInfo, PolicyInfo, PolicyKind
from tests.agents.worlds import FORECAST, a_call

LIMIT = 6
WEIGHT = 2.0  # of every replica; the unit of cost is one L40S

OPERATOR = Actor(type="key", name="olga", role="operator")
ADMIN = Actor(type="key", name="ada", role="admin")
VIEWER = Actor(type="key", name="vera", role="viewer")
CLIENT = Actor(type="key", name="carl", role="client")
COORDINATOR = Actor(type="coordinator", name="coordinator", role="operator")


def _validate(kind: PolicyKind, name: str, parameters: Mapping[str, float]) -> None:
    if parameters.get("low", 0.0) > parameters.get("high", 1.0):
        raise ConfigError(f"low of {name} is above high")


CATALOGUE = Catalogue(
    policies={
        "routing": {
            "least_work": PolicyInfo(help="the default"),
            "sticky": PolicyInfo(help="sticks", parameters={"weight": ParameterInfo(default=0.5, low=0.0, high=8.0)}),
        },
        "scaling": {
            "static": PolicyInfo(help="never moves"),
            "tracking": PolicyInfo(
                help="tracks",
                parameters={
                    "low": ParameterInfo(default=0.4, low=0.0, high=1.0),
                    "high": ParameterInfo(default=0.8, low=0.1, high=1.0),
                },
            ),
        },
    },
    validate_policy=_validate,
    explain=lambda decision: [f"{decision.call.call_id} went to {decision.replica_id}"],
)


def decision_about(call_id: str) -> Decision:
    return Decision(
        call=a_call(call_id),
        attempt=1,
        at_s=990.0,
        policy="least_work",
        parameters={},
        replica_id="coder-1",
        runner_up=None,
        forecast=FORECAST,
        candidates=Candidates(
            total=1,
            replica_ids=("coder-1",),
            in_flight=(0,),
            remaining_work=(0.0,),
            context_tokens=(0.0,),
            signal_age_s=(None,),
            cost_s=None,
            terms_s={},
        ),
    )


def call(tool: str, **arguments: Any) -> ToolCall:
    return ToolCall(tool=tool, arguments=arguments)


@dataclass(kw_only=True)
class Load:
    """How a model's calls fare."""

    arrivals_per_s: float = 2.0
    ended: int = 120
    failed: int = 0
    p95_s: float | None = 4.0
    waiting: int = 0


@dataclass(kw_only=True)
class World:
    """`coder` and `writer` can be scaled, `painter` cannot."""

    at_s: float = 1000.0
    replicas: dict[str, tuple[str, ReplicaState]] = field(
        default_factory=lambda: {
            "coder-1": ("coder", "ready"),
            "coder-2": ("coder", "ready"),
            "writer-1": ("writer", "ready"),
            "writer-2": ("writer", "ready"),
            "painter-1": ("painter", "ready"),
        }
    )
    bounds: dict[str, tuple[int, int]] = field(default_factory=lambda: {"coder": (1, 4), "writer": (1, 4)})
    loads: dict[str, Load] = field(default_factory=lambda: {name: Load() for name in ("coder", "writer", "painter")})
    routing: PolicyStatus = field(default_factory=lambda: PolicyStatus(policy="least_work", parameters={}))
    scaling: PolicyStatus = field(
        default_factory=lambda: PolicyStatus(policy="tracking", parameters={"low": 0.4, "high": 0.8})
    )
    started: int = 0

    def now_s(self) -> float:
        return self.at_s

    def do(self, output: Message | Action) -> None:
        match output:
            case ScaleRequested():
                self._scale(output.model, output.replicas)
            case BoundsChanged():
                self.bounds[output.model] = (output.min_replicas, output.max_replicas)
            case PolicyChanged():
                self.routing = PolicyStatus(policy=output.policy, parameters=output.parameters)
            case ScalingPolicyChanged():
                self.scaling = PolicyStatus(policy=output.policy, parameters=output.parameters)
            case Drain():
                self.put(output.replica_id, "draining")
            case Cordon():
                self.put(output.replica_id, "cordoned" if output.cordoned else "ready")
            case _:
                raise AssertionError(f"no tool should send {output}")

    def put(self, replica_id: str, state: ReplicaState) -> None:
        self.replicas[replica_id] = (self.replicas[replica_id][0], state)

    def having(self, model: str, *states: ReplicaState) -> list[str]:
        return [name for name, (of, state) in self.replicas.items() if of == model and state in states]

    def _scale(self, model: str, replicas: int) -> None:
        for name in [*self.having(model, "ready"), *self.having(model, "starting")][replicas:]:
            self.put(name, "draining")
        while len(self.having(model, "ready", "starting")) < replicas:
            self.started += 1
            self.replicas[f"{model}-new{self.started}"] = (model, "starting")

    def view(
        self, proposals: tuple[Proposal, ...] = (), decisions: dict[str, tuple[Decision, ...]] | None = None
    ) -> ControlView:
        return ControlView(
            at_s=self.at_s,
            window_s=60.0,
            models={name: self._model(name) for name in self.loads},
            replicas={name: self._replica(name) for name in self.replicas},
            routing=self.routing,
            scaling=self.scaling,
            workflows_running=3,
            workflows_ended=40,
            workflow_p95_s=20.0,
            proposals=proposals,
            decisions=decisions or {},
        )

    def _model(self, name: str) -> ModelStatus:
        load, (low, high) = self.loads[name], self.bounds.get(name, (None, None))
        alive = self.having(name, "ready", "starting", "cordoned", "draining")
        return ModelStatus(
            model=name,
            kind="llm",
            ready=len(self.having(name, "ready")),
            starting=len(self.having(name, "starting")),
            cordoned=len(self.having(name, "cordoned")),
            draining=len(self.having(name, "draining")),
            in_flight=4,
            waiting=load.waiting,
            window_s=60.0,
            arrivals_per_s=load.arrivals_per_s,
            ended=load.ended,
            failed=load.failed,
            p50_s=None if load.p95_s is None else load.p95_s / 2,
            p95_s=load.p95_s,
            wait_p95_s=0.1,
            cost_rate=WEIGHT * len(alive),
            next_cost=WEIGHT,
            min_replicas=low,
            max_replicas=high,
            limit=LIMIT if low is not None else None,
            start_s=5.0,
        )

    def _replica(self, name: str) -> ReplicaStatus:
        model, state = self.replicas[name]
        return ReplicaStatus(
            replica_id=name,
            model=model,
            kind="llm",
            device="l40s",
            url="",
            provider="emulated",
            emulated=True,
            state=state,
            in_flight=0,
            calls=0,
            utilisation=0.0,
            running=None,
            waiting=None,
            kv_usage=None,
            signal_age_s=None,
        )

    def facts(self) -> dict[tuple[str, str], Scalar | None]:
        """Everything that a tool may promise to change, read from the world and not through the tools."""
        found: dict[tuple[str, str], Scalar | None] = {}
        for model in self.loads:
            found[model, "replicas"] = len(self.having(model, "ready", "starting"))
        for model, (low, high) in self.bounds.items():
            found[model, "min_replicas"], found[model, "max_replicas"] = low, high
        for kind, status in (("routing", self.routing), ("scaling", self.scaling)):
            found[kind, "policy"] = status.policy
            found |= {(kind, f"{status.policy}.{name}"): value for name, value in status.parameters.items()}
        return found | {(name, "state"): state for name, (_, state) in self.replicas.items()}

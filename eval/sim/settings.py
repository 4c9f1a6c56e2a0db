"""How a simulation is set up: what the router is told, how long messages travel, and what goes wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from swarmx.agents.router_settings import RouterSettings
from swarmx.core.engine_order import GAMMA_PER_TOKEN, OrderName
from swarmx.core.errors import ConfigError

ForecastName = Literal["neural", "role_means", "role_quantiles", "oracle"]
PathName = Literal["none", "means", "neural", "oracle", "oracle_call"]
FaultKind = Literal["crash", "drain", "return", "slow"]


class Fault(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """At `at_s` something happens to a replica.

    `crash`: it is gone with all that it holds. `drain`: it takes no more calls and stops when it has none, or
    `notice_s` later whatever it has. `return`: one that is gone starts again; one that drains goes on. `slow`: from
    now on it takes `factor` times as long as its profile says, which routers are not told.
    """

    at_s: float
    replica_id: str
    kind: FaultKind
    factor: float = 1.0
    notice_s: float = math.inf


class SimSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but the workload, the fleet and the seed. Times in seconds of virtual time.

    `forecast` is what the router hears of a call's work: "neural" is `Workload.quantiles`; "role_means" and
    "role_quantiles" are the running mean and the empirical quantiles of the last 200 calls by (workflow kind, role,
    model), for the calls whose work the request does not tell; "oracle" is the truth. `path` is what it hears of the
    rest of the workflow: "none", as the gateway does without a predictor, leaves it to the router's own averages;
    "means" and "neural" are `WorkflowForecasts` without and with the trained heads of `weights` (those that ship where
    that is None); "oracle" is the critical path that really remains, on an idle device of middling speed, and
    "oracle_call" the part of it that begins with the call. `token_error` is the relative deviation of the estimated
    prompt tokens, `speed_error` that of the replicas' true speeds, both lognormal.

    A message takes `network_s` each way between router and replica, `forecast_s` passes before a call is announced and
    `decision_s` before it is sent. With `stream`, answers of LLMs are streamed: their first token is told, and their
    progress every `progress_tokens`; without it, as in the workflows of the gateway, only their end.

    Of `routers`, each has the workflows that hash to it. They send calls anywhere ("shared"), or to the one that the
    model hashes to, `network_s` away, which alone decides ("owned"). Replicas tell their counters every
    `signal_every_s` (0: never), heard `signal_age_s` later.

    That a replica is gone is noticed `gone_after_s` later, one that returns is ready after `start_s`. The run ends when
    all workflows have, or `drain_s` after the last arrival. `order` and `gamma_per_token` are the engines'.
    """

    router: RouterSettings = RouterSettings(log_decisions=False, demand_every_s=0.0)
    forecast: ForecastName = "neural"
    path: PathName = "none"
    weights: Path | None = None
    token_error: float = 0.0
    speed_error: float = 0.0
    network_s: float = 0.001
    forecast_s: float = 0.0003
    decision_s: float = 0.0001
    stream: bool = False
    progress_tokens: int = 128
    routers: int = 1
    ownership: Literal["shared", "owned"] = "shared"
    signal_every_s: float = 1.0
    signal_age_s: float = 0.0
    faults: tuple[Fault, ...] = ()
    gone_after_s: float = 2.0
    start_s: float = 60.0
    drain_s: float = 3600.0
    order: OrderName = "arrival"
    gamma_per_token: float = GAMMA_PER_TOKEN

    def __post_init__(self) -> None:
        for name in ("network_s", "forecast_s", "decision_s", "signal_every_s", "signal_age_s", "gone_after_s",
                     "start_s", "drain_s", "token_error", "speed_error"):  # fmt: skip
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"{name} is {value}, expected a finite number from 0 on.")
        if self.routers < 1 or self.progress_tokens < 1:
            raise ConfigError(
                f"there are {self.routers} routers and progress every {self.progress_tokens} tokens; "
                "both must be at least 1."
            )

"""Scaling policies, one file each, and the catalogue that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from swarmx.agents.scaling.demand_forecast import DemandForecast
from swarmx.agents.scaling.static import Static
from swarmx.agents.scaling.target_tracking import TargetTracking
from swarmx.core.errors import ConfigError
from swarmx.core.ports import ScalingPolicy
from swarmx.core.words import near

SCALING_POLICIES: Mapping[str, Callable[..., ScalingPolicy]] = {
    "static": Static,
    "target_tracking": TargetTracking,
    "demand_forecast": DemandForecast,
}
DEFAULT_SCALING_POLICY = "demand_forecast"


def make_scaling_policy(name: str, parameters: Mapping[str, float] | None = None) -> ScalingPolicy:
    """The policy of that name. Raises ConfigError for an unknown name or parameter, or a value out of range."""
    if name not in SCALING_POLICIES:
        known = ", ".join(SCALING_POLICIES)
        raise ConfigError(f"unknown scaling policy {name!r}; there are {known}.{near(name, SCALING_POLICIES)}")
    fields = scaling_parameters_of(name)
    for key in parameters or {}:
        if key not in fields:
            raise ConfigError(
                f"scaling policy {name!r} has no parameter {key!r}; it has {', '.join(fields) or 'none'}."
                f"{near(key, fields)}"
            )
    return SCALING_POLICIES[name](**dict(parameters or {}))


def scaling_parameters_of(name: str) -> dict[str, float]:
    """The parameters of a policy with their defaults."""
    return {f.name: float(f.default) for f in dataclasses.fields(SCALING_POLICIES[name])}  # type: ignore[arg-type]


def describe_scaling(name: str) -> str:
    """First line of a policy's docstring."""
    return (SCALING_POLICIES[name].__doc__ or "").strip().splitlines()[0]

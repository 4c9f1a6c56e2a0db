"""Routing policies, one file each, and the catalogue that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from swarmx.agents.policies.least_outstanding import LeastOutstanding
from swarmx.agents.policies.least_work import LeastWork
from swarmx.agents.policies.marginal import Marginal
from swarmx.agents.policies.power_of_two import PowerOfTwo
from swarmx.agents.policies.random import Random
from swarmx.agents.policies.round_robin import RoundRobin
from swarmx.core.errors import ConfigError
from swarmx.core.ports import Policy
from swarmx.core.words import near

POLICIES: Mapping[str, Callable[..., Policy]] = {
    "random": Random,
    "round_robin": RoundRobin,
    "power_of_two": PowerOfTwo,
    "least_outstanding": LeastOutstanding,
    "least_work": LeastWork,
    "marginal": Marginal,
}
DEFAULT_POLICY = "least_work"


def make_policy(name: str, parameters: Mapping[str, float] | None = None) -> Policy:
    """The policy of that name. Raises ConfigError for an unknown name or parameter, naming the nearest."""
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}.{near(name, POLICIES)}")
    known = parameters_of(name)
    for key in parameters or {}:
        if key not in known:
            raise ConfigError(
                f"policy {name!r} has no parameter {key!r}; it has {', '.join(known) or 'none'}.{near(key, known)}"
            )
    return POLICIES[name](**dict(parameters or {}))


def parameters_of(name: str) -> dict[str, float]:
    """The parameters of a policy with their defaults."""
    return {f.name: float(f.default) for f in dataclasses.fields(POLICIES[name])}  # type: ignore[arg-type]


def describe(name: str) -> str:
    """First line of a policy's docstring."""
    return (POLICIES[name].__doc__ or "").strip().splitlines()[0]

"""Routing policies, one file each, and the catalogue that names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from swarmx.agents.policies.aibrix_prefix import AibrixPrefix
from swarmx.agents.policies.autellix_plas import AutellixPlas
from swarmx.agents.policies.dynamo_kv import DynamoKv
from swarmx.agents.policies.gittins import Gittins
from swarmx.agents.policies.least_outstanding import LeastOutstanding
from swarmx.agents.policies.least_work import LeastWork
from swarmx.agents.policies.llmd_load import LlmdLoad
from swarmx.agents.policies.llmd_predicted import LlmdPredicted
from swarmx.agents.policies.llmd_sticky import LlmdSticky
from swarmx.agents.policies.marginal import Marginal
from swarmx.agents.policies.murakkab_mean import MurakkabMean
from swarmx.agents.policies.power_of_two import PowerOfTwo
from swarmx.agents.policies.preble import Preble
from swarmx.agents.policies.random import Random
from swarmx.agents.policies.round_robin import RoundRobin
from swarmx.agents.policies.session_affinity import SessionAffinity
from swarmx.agents.policies.sglang_cache_aware import SglangCacheAware
from swarmx.agents.policies.speed_edf import SpeedEdf
from swarmx.agents.policies.swarmx_paper import SwarmXPaper
from swarmx.agents.policies.swarmx_paper_repo import SwarmXPaperRepo
from swarmx.agents.policies.thunderagent import ThunderAgent
from swarmx.agents.policies.weighted_least_outstanding import WeightedLeastOutstanding
from swarmx.core.errors import ConfigError
from swarmx.core.ports import Policy
from swarmx.core.words import near

POLICIES: Mapping[str, Callable[..., Policy]] = {
    "random": Random,
    "round_robin": RoundRobin,
    "power_of_two": PowerOfTwo,
    "least_outstanding": LeastOutstanding,
    "weighted_least_outstanding": WeightedLeastOutstanding,
    "least_work": LeastWork,
    "speed_edf": SpeedEdf,
    "session_affinity": SessionAffinity,
    "sglang_cache_aware": SglangCacheAware,
    "aibrix_prefix": AibrixPrefix,
    "preble": Preble,
    "dynamo_kv": DynamoKv,
    "llmd_load": LlmdLoad,
    "llmd_sticky": LlmdSticky,
    "llmd_predicted": LlmdPredicted,
    "murakkab_mean": MurakkabMean,
    "autellix_plas": AutellixPlas,
    "gittins": Gittins,
    "thunderagent": ThunderAgent,
    "swarmx_paper": SwarmXPaper,
    "swarmx_paper_repo": SwarmXPaperRepo,
    "marginal": Marginal,
}
DEFAULT_POLICY = "marginal"


def make_policy(name: str, parameters: Mapping[str, float] | None = None) -> Policy:
    """The policy of that name, ready to decide. Raises as `check_policy` does."""
    check_policy(name, parameters)
    return POLICIES[name](**dict(parameters or {}))


def check_policy(name: str, parameters: Mapping[str, float] | None = None) -> None:
    """Raises ConfigError for an unknown name or parameter, naming the nearest. Compiles nothing."""
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}.{near(name, POLICIES)}")
    known = parameters_of(name)
    for key in parameters or {}:
        if key not in known:
            raise ConfigError(
                f"policy {name!r} has no parameter {key!r}; it has {', '.join(known) or 'none'}.{near(key, known)}"
            )


def parameters_of(name: str) -> dict[str, float]:
    """The parameters of a policy with their defaults."""
    return {f.name: float(f.default) for f in dataclasses.fields(POLICIES[name])}  # type: ignore[arg-type]


def describe(name: str) -> str:
    """First line of a policy's docstring."""
    return (POLICIES[name].__doc__ or "").strip().splitlines()[0]

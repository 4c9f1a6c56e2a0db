"""Who takes part: every baseline with the information that its original has, ours, its ablations, and bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from eval.experiment.grids import Settings
from eval.experiment.jobs import BOUND
from eval.sim.settings import ForecastName
from swarmx.agents.policies import POLICIES, parameters_of
from swarmx.core.engine_order import OrderName
from swarmx.core.errors import ConfigError
from swarmx.core.words import near

Group = Literal["baselines", "ours", "ablations", "bounds"]

OURS, ROLE_MEANS, LENGTHS, ORACLE = "marginal", "marginal/role_means", "marginal/lengths", "oracle"
EARLY = "marginal/early"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A policy with what it is told of the work of calls. `like` names the contestant whose tuned settings it takes;
    None is its own. `without` is the ingredient that an ablation takes away. With `order`, calls wait in the engines,
    in that order."""

    name: str
    policy: str
    group: Group
    forecast: ForecastName = "role_means"
    like: str | None = None
    without: str | None = None
    order: OrderName | None = None

    def settled(self, tuned: Settings) -> Settings | None:
        """Its settings, after those that a search found; None where there is nothing to take away."""
        if self.name == ORACLE:
            return msgspec.structs.replace(tuned, path="oracle")
        if self.name == EARLY:
            return msgspec.structs.replace(tuned, late_binding=False) if tuned.late_binding else None
        if self.without is None:
            return tuned
        if not tuned.parameters[self.without]:
            return None
        return msgspec.structs.replace(tuned, parameters=tuned.parameters | {self.without: 0.0})

    def allowed(self, settings: Settings) -> Settings:
        """The settings with nothing that it must not hear, or cannot be: who knows means only hears means of paths."""
        if self.order is not None:
            settings = msgspec.structs.replace(settings, order=self.order, late_binding=False)
        if self.forecast == "role_means" and settings.path == "neural":
            return msgspec.structs.replace(settings, path="means")
        return settings


_FORESEES = ("least_work", "gittins", "swarmx_paper", "swarmx_paper_repo")
"""Baselines whose originals see a forecast of the call; the others see the running mean of its role, if anything."""


def contestants() -> dict[str, Contestant]:
    """All of them by name."""
    made = [
        Contestant(name=name, policy=name, group="baselines", forecast="neural" if name in _FORESEES else "role_means")
        for name in POLICIES
        if name != OURS
    ]
    made += [
        Contestant(name="least_work/role_means", policy="least_work", group="baselines"),
        Contestant(name="uniboost", policy="least_work", group="baselines", forecast="neural", order="uniboost"),
        Contestant(name=OURS, policy=OURS, group="ours", forecast="neural"),
        Contestant(name=ROLE_MEANS, policy=OURS, group="ours"),
        Contestant(name=EARLY, policy=OURS, group="ablations", forecast="neural", like=OURS),
        *(
            Contestant(
                name=f"{OURS}/no_{each}", policy=OURS, group="ablations", forecast="neural", like=OURS, without=each
            )
            for each in parameters_of(OURS)
        ),
        Contestant(name=LENGTHS, policy=OURS, group="bounds", forecast="oracle", like=OURS),
        Contestant(name=ORACLE, policy=OURS, group="bounds", forecast="oracle", like=OURS),
        Contestant(
            name="least_work/lengths", policy="least_work", group="bounds", forecast="oracle", like="least_work"
        ),
        Contestant(name=BOUND, policy=BOUND, group="bounds"),
    ]  # fmt: skip
    return {each.name: each for each in made}


GROUPS: tuple[Group, ...] = ("baselines", "ours", "ablations", "bounds")


def chosen(names: Sequence[str], known: Mapping[str, Contestant]) -> list[Contestant]:
    """Those of these names or groups, in the order of the list of all. Raises ConfigError for a name that is none."""
    for name in names:
        if name not in known and name not in GROUPS:
            everything = [*GROUPS, *known]
            raise ConfigError(
                f"there is no contestant {name!r}, expected {', '.join(everything)}.{near(name, everything)}"
            )
    return [each for each in known.values() if each.name in names or each.group in names]

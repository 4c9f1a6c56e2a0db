"""What the tools are told of the agents' policies."""

from __future__ import annotations

import math
from collections.abc import Mapping

from swarmx.agents.explain import explain
from swarmx.agents.policies import POLICIES, check_policy, describe, parameters_of
from swarmx.agents.scaling import SCALING_POLICIES, describe_scaling, make_scaling_policy, scaling_parameters_of
from swarmx.tools.catalogue import Catalogue, ParameterInfo, PolicyInfo, PolicyKind


def catalogue() -> Catalogue:
    """Both catalogues; the policies themselves say which values they take."""
    return Catalogue(
        policies={
            "routing": {name: _info(describe(name), parameters_of(name)) for name in POLICIES},
            "scaling": {name: _info(describe_scaling(name), scaling_parameters_of(name)) for name in SCALING_POLICIES},
        },
        validate_policy=_validate,
        explain=explain,
    )


def _info(text: str, parameters: Mapping[str, float]) -> PolicyInfo:
    return PolicyInfo(
        help=text, parameters={n: ParameterInfo(default=v, low=0.0, high=math.inf) for n, v in parameters.items()}
    )


def _validate(kind: PolicyKind, name: str, parameters: Mapping[str, float]) -> None:
    if kind == "routing":
        check_policy(name, parameters)
    else:
        make_scaling_policy(name, parameters)

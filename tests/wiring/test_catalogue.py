"""The tools are told of every policy that there is."""

from __future__ import annotations

import pytest

from swarmx.agents.policies import POLICIES
from swarmx.agents.scaling import SCALING_POLICIES, scaling_parameters_of
from swarmx.core.errors import ConfigError
from swarmx.wiring.catalogue import catalogue


def test_every_policy_is_in_the_catalogue_with_its_parameters() -> None:
    known = catalogue().policies
    assert set(known["routing"]) == set(POLICIES)
    assert set(known["scaling"]) == set(SCALING_POLICIES)
    for name in SCALING_POLICIES:
        told = {parameter: info.default for parameter, info in known["scaling"][name].parameters.items()}
        assert told == scaling_parameters_of(name)


def test_a_value_that_a_policy_would_not_take_is_refused_by_it() -> None:
    with pytest.raises(ConfigError, match="target_in_flight"):
        catalogue().validate_policy("scaling", "target_tracking", {"target_in_flight": -1.0})
    with pytest.raises(ConfigError, match="unknown policy"):
        catalogue().validate_policy("routing", "wishes", {})

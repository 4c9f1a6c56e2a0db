"""The policy in force: it may be changed, and it may fail."""

from __future__ import annotations

import numpy as np
import pytest

from swarmx.agents.objective import FALLBACK_POLICY, Objective
from swarmx.agents.policies import POLICIES
from swarmx.core.errors import ConfigError
from swarmx.core.messages import AlertRaised, PolicyChanged


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_put_in_force_with_its_parameters_as_numbers(policy: str) -> None:
    objective = Objective(FALLBACK_POLICY, {})
    assert objective.change(PolicyChanged(policy=policy, parameters={})) == ()
    assert objective.policy.name == policy
    assert all(isinstance(value, float) for value in objective.parameters.values())


def test_a_policy_that_does_not_exist_is_told_and_the_one_in_force_stays() -> None:
    objective = Objective("power_of_two", {})
    alerts = objective.change(PolicyChanged(policy="psychic", parameters={}))
    assert alerts == (AlertRaised(kind="policy_failed", subject="psychic"),)
    assert objective.policy.name == "power_of_two"


def test_an_objective_cannot_begin_with_a_policy_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="psychic"):
        Objective("psychic", {})


def test_the_answer_of_a_policy_that_raises_is_the_fallbacks_and_names_both() -> None:
    class Broken:
        name = "broken"

        def choose(self, call: object, fleet: object, rng: np.random.Generator) -> object:
            raise RuntimeError("out of ideas")

    class Fleet:
        in_flight = np.array([3, 1, 2])
        last_chosen = np.array([0, 0, 0])

        def __len__(self) -> int:
            return 3

    objective = Objective(FALLBACK_POLICY, {})
    objective.policy = Broken()  # type: ignore[assignment]
    choice, policy, alerts = objective.choose(None, Fleet(), np.random.default_rng(0))  # type: ignore[arg-type]
    assert (choice.index, policy.name) == (1, FALLBACK_POLICY)
    assert alerts == (AlertRaised(kind="policy_failed", subject="broken"),)

"""The router's objective: the policy in force, which may be changed and may fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from swarmx.agents.choice import is_sound
from swarmx.agents.policies import make_policy, parameters_of
from swarmx.core.errors import ConfigError
from swarmx.core.fleet import CallView, Choice, FleetView
from swarmx.core.messages import AlertRaised, PolicyChanged
from swarmx.core.ports import Policy

FALLBACK_POLICY = "least_outstanding"  # needs nothing but this router's own counts, so nothing can make it fail


class Objective:
    """Chooses by `policy`; where that fails, by `FALLBACK_POLICY`, by name."""

    def __init__(self, policy: str, parameters: Mapping[str, float]) -> None:
        self.policy: Policy = make_policy(policy, parameters)
        self.parameters = parameters_in(self.policy)
        self._fallback = make_policy(FALLBACK_POLICY)

    def choose(
        self, call: CallView, view: FleetView, rng: np.random.Generator
    ) -> tuple[Choice, Policy, Sequence[AlertRaised]]:
        """What to do, by which policy, and what an operator should know of it."""
        try:
            choice = self.policy.choose(call, view, rng)
            sound = is_sound(choice, len(view))
        except Exception:  # noqa: BLE001  # a policy is a plug-in: whatever it raises must not stop the data path
            sound = False
        if sound:
            return choice, self.policy, ()
        alert = AlertRaised(kind="policy_failed", subject=self.policy.name)
        return self._fallback.choose(call, view, rng), self._fallback, (alert,)

    def change(self, message: PolicyChanged) -> Sequence[AlertRaised]:
        """Choose by another policy from now on."""
        try:
            policy = make_policy(message.policy, message.parameters)
        except ConfigError:  # from a newer version, say: the policy in force stays
            return (AlertRaised(kind="policy_failed", subject=message.policy),)
        self.policy, self.parameters = policy, parameters_in(policy)
        return ()


def parameters_in(policy: Policy) -> dict[str, float]:
    """The parameters of a policy, as they are set."""
    return {name: float(getattr(policy, name)) for name in parameters_of(policy.name)}

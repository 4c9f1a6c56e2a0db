"""How the calls of one function, or of one pool of actors, are routed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from swarmx.agents.policies import DEFAULT_POLICY, check_policy
from swarmx.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """The keywords of `routed`. Raises ConfigError.

    `model` is the name under which durations are learnt and decisions are kept, by default that of the function or of
    the actors' class; `kind` groups calls that belong to alike workflows. `size` says how large the work of a call is,
    from its arguments: calls of about the same size are forecast from each other; by default it is read from numbers
    and lengths. `slots` is how many calls an actor runs at a time (its `max_concurrency`).

    `policy` and `parameters` are those of the router agent. Decisions go into a file in `log_dir`, to the gateway at
    `log_url` (with the token in the environment variable `log_token_env`), or both.
    """

    model: str = ""
    kind: str = "ray"
    size: Callable[..., float] | None = None
    slots: int = 1
    policy: str = DEFAULT_POLICY
    parameters: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    log_dir: str = ""
    log_url: str = ""
    log_token_env: str = "SWARMX_TOKEN"  # noqa: S105  # the name of a variable

    def __post_init__(self) -> None:
        check_policy(self.policy, self.parameters)
        if self.slots < 1:
            raise ConfigError(f"slots is {self.slots}, an actor runs one call at a time at least.")

    def class_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The order of magnitude of a call's size, in powers of two; 0 where nothing tells it."""
        size = self.size(*args, **kwargs) if self.size is not None else sum(map(_size, (*args, *kwargs.values())))
        return int(abs(size)).bit_length() if abs(size) < 1e18 else 60


def _size(value: Any) -> float:
    """What is cheap to know of an argument: how large a number is, how long a sequence, how many bytes an array."""
    if isinstance(value, bool) or value is None:
        return 0.0
    if isinstance(value, int | float):
        return min(abs(float(value)), 1e18) if value == value else 0.0  # not a number
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return float(nbytes)
    return float(len(value)) if isinstance(value, str | bytes | list | tuple | dict | set) else 0.0

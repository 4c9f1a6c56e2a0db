"""What `request_router_kwargs` of a Serve config file may say, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from swarmx.agents.policies import DEFAULT_POLICY, check_policy
from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.errors import ConfigError
from swarmx.core.words import near

T = TypeVar("T", bound=msgspec.Struct)


class RouterOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How SwarmX routes for one deployment. Times in seconds.

    `profile` are fields of `core.engine.EngineProfile` that are known beforehand, `device` and `served_model` name one
    that ships; what calls really take corrects either. With `read_first` the predictor reads a prompt before a replica
    is chosen and not after that: a decision takes longer, and fewer long calls go to slow replicas. A request that
    Serve has accepted and whose replica is lost is sent again up to `retries` times if its method is among
    `retry_methods`: name only methods that may run twice. Requests of a session (or, without one, of one ingress
    request) are a workflow, over when it was silent for `workflow_idle_s`. `push` listens to what replicas and other
    routers push. Calls that wait have full replicas asked for their load every `look_again_s`, for where nothing is
    pushed.

    `log_dir` keeps each decision, a file for every router; with `journal` each message of the agent, too, for
    `swarmx replay`. `log_url` sends the decisions to a SwarmX gateway, with the token in the environment variable
    `log_token_env`.
    """

    policy: str = DEFAULT_POLICY
    parameters: dict[str, float] = {}
    predictor: Literal["neural", "empirical"] = "neural"
    read_first: bool = False
    profile: dict[str, float] = {}
    served_model: str = ""
    device: str = ""
    retries: int = 0
    retry_methods: tuple[str, ...] = ()
    workflow_idle_s: float = 30.0
    targets: dict[str, float] = {}
    push: bool = True
    look_again_s: float = 0.25
    call_timeout_s: float = 3600.0
    log_dir: str = ""
    journal: bool = False
    log_url: str = ""
    log_token_env: str = "SWARMX_TOKEN"  # noqa: S105  # the name of a variable
    seed: int = 0

    def policy_parameters(self) -> dict[str, float]:
        """The parameters with this router's own defaults.

        `risk` is off: a request is sent by what its kind came to, which is a wide guess at a single call, and with risk
        the fastest replica would get, or make wait for it, whatever may be long. `hold` counts a wait for a busy one
        as half as long again as it looks: who waits may be overtaken, and keeps others waiting.
        """
        own = {"risk": 0.0, "hold": 0.67} if self.policy == DEFAULT_POLICY else {}
        return {**own, **self.parameters}

    def engine(self, deployment: str) -> EngineProfile:
        """The profile that every replica has until its calls have shown another. Raises ConfigError."""
        base = EngineProfile(model=deployment, device="ray", step_base_s=0.02, decode_seq_s=0.002)
        if self.device or self.served_model:
            known = profiles().get((self.served_model, self.device))
            if known is None:
                raise ConfigError(
                    f"there is no profile of {self.served_model!r} on {self.device!r}; "
                    f"there are {', '.join(f'{m} on {d}' for m, d in profiles())}."
                )
            base = known
        for name in self.profile:
            if name not in EngineProfile.__struct_fields__:
                raise ConfigError(f"an engine profile has no {name!r}.{near(name, EngineProfile.__struct_fields__)}")
        changed = msgspec.to_builtins(base) | self.profile | {"model": deployment}
        return msgspec.convert(changed, EngineProfile, strict=False)


def options_of(form: type[T], given: Mapping[str, Any], where: str) -> T:
    """What is given as a struct of this form. Raises ConfigError for an unknown name or a value that does not fit."""
    known = form.__struct_fields__
    for name in given:
        if name not in known:
            raise ConfigError(f"{where} has no {name!r}; it has {', '.join(known)}.{near(name, known)}")
    try:
        return msgspec.convert(dict(given), form, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where} cannot be used: {error}.") from None


def read_options(given: Mapping[str, Any]) -> RouterOptions:
    """The options, checked. Raises ConfigError for what is unknown or out of range."""
    options = options_of(RouterOptions, given, "request_router_kwargs")
    check_policy(options.policy, options.parameters)
    for name, least in (("retries", 0), ("look_again_s", 0.01), ("workflow_idle_s", 0.1), ("call_timeout_s", 0.1)):
        if getattr(options, name) < least:
            raise ConfigError(f"request_router_kwargs: {name} is {getattr(options, name)}, expected {least} or more.")
    if options.retries and not options.retry_methods:
        raise ConfigError(
            "request_router_kwargs: retries without retry_methods; name the methods that may run twice, such as "
            '["__call__"].'
        )
    return options

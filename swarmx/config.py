"""Settings: read once from a TOML file, strict, each with a default and a help text."""

from __future__ import annotations

import difflib
import ipaddress
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from swarmx.agents.policies import DEFAULT_POLICY, make_policy
from swarmx.agents.router import RouterSettings
from swarmx.core.errors import ConfigError

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSection(_Section):
    """Where the gateway listens and what it accepts."""

    host: str = Field("127.0.0.1", description="Address to listen on. A token is needed on every address.")
    port: int = Field(8100, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="Largest request body; larger ones get 413.")
    drain_s: int = Field(10, ge=0, description="How long answers in progress may take when the server is stopped.")


class StateSection(_Section):
    """Where SwarmX keeps what outlives it."""

    dir: Path = Field(Path(".swarmx"), description="Folder of the database, the keys and the journals (mode 0700).")
    journal: bool = Field(True, description="Write every message of the agents to a journal, for `swarmx replay`.")


class RouterSection(_Section):
    """The router agent."""

    policy: str = Field(DEFAULT_POLICY, description="Routing policy; `swarmx policies` lists them.")
    parameters: dict[str, FiniteFloat] = Field({}, description="Parameters of the policy.")
    seed: int = Field(0, ge=0, description="Seed of the random choices of the policy.")
    max_attempts: int = Field(3, ge=1, le=10, description="Replicas that a call tries before it is given up.")
    queue_timeout_s: Seconds = Field(30.0, description="How long a call waits for a replica when there is none.")
    first_token_timeout_s: Seconds = Field(120.0, description="Silence before a streamed call moves elsewhere.")
    call_timeout_s: Seconds = Field(1200.0, description="Silence before a call that is not streamed moves elsewhere.")
    breaker_failures: int = Field(3, ge=1, description="Failures in a row that take a replica out of rotation.")
    breaker_open_s: Seconds = Field(10.0, description="How long it stays out before one more call is tried.")

    @model_validator(mode="after")
    def _known_policy(self) -> Self:
        try:
            make_policy(self.policy, self.parameters)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def settings(self) -> RouterSettings:
        """The agent's own form of these settings."""
        return RouterSettings(**self.model_dump())


class WatchSection(_Section):
    """How replicas are observed."""

    every_s: Seconds = Field(1.0, description="How often each replica's /metrics is read.")
    timeout_s: Seconds = Field(2.0, description="How long an answer may take.")
    failures: int = Field(3, ge=1, description="Failed reads in a row after which a replica counts as gone.")


class WorkflowSection(_Section):
    """Workflows."""

    transparent_idle_s: Seconds = Field(
        600.0, description="Silence after which a workflow known only from its headers counts as finished."
    )


class StaticReplica(_Section):
    """A server that somebody else runs, under `[[replicas]]`."""

    id: str = Field(description="Name of the replica, unique.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    model: str = Field(description="Model name, as clients ask for it and as the server knows it.")
    url: str = Field(description="Base URL, without /v1.", pattern=r"^https?://[^\s/]+(/[^\s]*)?$")
    kind: Literal["llm", "image"] = Field("llm", description="What it serves: chat completions or images.")
    device: str = Field("unknown", description="Device type, such as h100; sets the speed that the router assumes.")
    profile: str | None = Field(None, description="Fitted profile to use, if its model has another name than this.")


class EmulatedReplicas(_Section):
    """Replicas that are emulated on this machine, under `[[emulated]]`. For trying things out; no model runs."""

    model: str = Field(description="Model of a fitted profile, such as qwen3-8b or sdxl.")
    device: str = Field(description="Device of a fitted profile, such as h100.")
    count: int = Field(1, ge=1, le=64, description="How many of them.")
    kind: Literal["llm", "image"] = Field("llm", description="What they serve.")
    size_class: Literal["small", "8b", "32b", "70b"] = Field("8b", description="Length statistics of the answers.")

    def ids(self) -> list[str]:
        """The names of the replicas."""
        return [f"{self.model}-{self.device}-{number}" for number in range(self.count)]


class EmulationSection(_Section):
    """All emulated replicas together."""

    time_scale: float = Field(1.0, gt=0.0, le=1000.0, description="How many times faster than real they run.")
    seed: int = Field(0, ge=0, description="Seed of what they answer.")


class Settings(_Section):
    """Everything that can be set."""

    server: ServerSection = ServerSection()
    state: StateSection = StateSection()
    router: RouterSection = RouterSection()
    watch: WatchSection = WatchSection()
    workflows: WorkflowSection = WorkflowSection()
    emulation: EmulationSection = EmulationSection()
    replicas: tuple[StaticReplica, ...] = ()
    emulated: tuple[EmulatedReplicas, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [replica.id for replica in self.replicas] + [i for group in self.emulated for i in group.ids()]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"replica ids must be unique, {', '.join(twice)} occurs more than once.")
        kinds: dict[str, str] = {}
        for model, kind in [(r.model, r.kind) for r in self.replicas] + [(g.model, g.kind) for g in self.emulated]:
            if kinds.setdefault(model, kind) != kind:
                raise ValueError(f"a model has one kind, {model} is given both llm and image.")
        return self


def load(path: Path | None) -> Settings:
    """The settings in a TOML file; all defaults without one. Raises ConfigError that names the key at fault."""
    if path is None:
        return Settings()
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the settings {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    return parse(data, source=str(path))


def parse(data: dict[str, Any], *, source: str = "settings") -> Settings:
    """Settings from a nested mapping. Raises ConfigError."""
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(data, item)}" for item in error.errors())) from None


def rows(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """(name, value, meaning) of every setting; the docs page and `swarmx config` are made from it."""
    for section, value in settings:
        if isinstance(value, BaseModel):
            for name, info in type(value).model_fields.items():
                yield f"{section}.{name}", str(getattr(value, name)), info.description or ""
        else:
            item: type[BaseModel] = StaticReplica if section == "replicas" else EmulatedReplicas
            for name, info in item.model_fields.items():
                values = [str(getattr(entry, name)) for entry in value]
                yield f"{section}[].{name}", ", ".join(values), info.description or ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _explain(data: dict[str, Any], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{path} is missing."
    if item["type"] == "value_error":
        return f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])
    if item["type"] != "extra_forbidden":
        return f"{path}: {item['msg']}; got {item['input']!r:.80}."
    *parents, name = item["loc"]
    known = _fields(Settings, [p for p in parents if isinstance(p, str)])
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known here: {', '.join(known)}."
    return f"unknown setting {path}.{hint}"


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        annotation: Any = model.model_fields[name].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0] if inner else annotation
    return list(model.model_fields)

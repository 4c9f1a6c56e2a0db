"""Settings: read once from a TOML file, strict, each with a default and a help text."""

from __future__ import annotations

import difflib
import ipaddress
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from swarmx.agents.policies import DEFAULT_POLICY, check_policy
from swarmx.agents.router_settings import RouterSettings, TenantSettings
from swarmx.agents.scaler import ScalerSettings
from swarmx.agents.scaling import DEFAULT_SCALING_POLICY, make_scaling_policy
from swarmx.core.control import Mode
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import PRIORITIES, ReplicaGroup
from swarmx.prices_config import ModelName, PriceEntry
from swarmx.ray_config import RaySection
from swarmx.replica_config import ElasticReplicas, EmulatedReplicas, Seconds, Section, StaticReplica
from swarmx.state_config import StateSection
from swarmx.toolbox_config import ToolReplicasEntry
from swarmx.tools.guard import GuardSettings

__all__ = ["ElasticReplicas", "EmulatedReplicas", "Settings", "StaticReplica", "is_loopback", "load", "parse", "rows"]

Weight = Annotated[float, Field(ge=0.0, le=1e6)]
TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ServerSection(Section):
    """Where the gateway listens and what it accepts."""

    host: str = Field("127.0.0.1", description="Address to listen on. A token is needed on every address.")
    port: int = Field(8100, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024, description="Largest request body; larger ones get 413.")
    drain_s: int = Field(10, ge=0, description="How long answers in progress may take when the server is stopped.")


class RouterSection(Section):
    """The router agent."""

    policy: str = Field(DEFAULT_POLICY, description="Routing policy; `swarmx policies` lists them.")
    parameters: dict[str, FiniteFloat] = Field({}, description="Parameters of the policy.")
    seed: int = Field(0, ge=0, description="Seed of the random choices of the policy.")
    max_attempts: int = Field(3, ge=1, le=10, description="Replicas that a call tries before it is given up.")
    queue_timeout_s: Seconds = Field(150.0, description="How long a call waits for a replica when there is none.")
    late_binding: bool = Field(True, description="Calls wait in the router, not in the queues of full replicas.")
    shared: bool = Field(
        False, description="Other servers send calls to the same replicas; metrics of the engines tell of them."
    )
    hold_limit_s: Seconds = Field(60.0, description="How long a call may be held for a busy replica that is faster.")
    targets: dict[str, Seconds] = Field(
        {}, description="How long workflows should take, by kind; without, twice usual."
    )
    demand_every_s: Seconds = Field(2.0, description="How often it reports the demand to the scaler.")
    first_token_timeout_s: Seconds = Field(120.0, description="Silence before a streamed call moves elsewhere.")
    call_timeout_s: Seconds = Field(1200.0, description="Silence before a call that is not streamed moves elsewhere.")
    breaker_failures: int = Field(3, ge=1, description="Failures in a row that take a replica out of rotation.")
    breaker_open_s: Seconds = Field(10.0, description="How long it stays out before one more call is tried.")
    prompt_token_weight: Weight = Field(1.0, description="What an uncached prompt token counts in a tenant's share.")
    output_token_weight: Weight = Field(2.0, description="What an output token counts in a tenant's share.")
    priority_age_s: Seconds = Field(30.0, description="Wait after which a call counts as one priority higher.")
    max_waiting: int = Field(10_000, ge=1, description="Calls of a model that may wait; further ones are refused.")

    @model_validator(mode="after")
    def _known_policy(self) -> Self:
        try:
            check_policy(self.policy, self.parameters)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def settings(self, models: list[str], tenants: Mapping[str, TenantSection]) -> RouterSettings:
        """The agent's own form of these settings; `models` may have no replica at first."""
        owed = {name: TenantSettings(**tenant.model_dump()) for name, tenant in tenants.items()}
        return RouterSettings(models=models, tenants=owed, **self.model_dump())


class TenantSection(Section):
    """One tenant, by its name: what it is owed and what it may take. Tenants without a section have the defaults."""

    weight: float = Field(
        1.0, gt=0.0, le=1e6, description="Its share of the service where calls of several tenants wait."
    )
    tokens_per_minute: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="Prompt and output tokens that it may use a minute; none: any."
    )
    priority: int = Field(
        0, ge=PRIORITIES[0], le=PRIORITIES[-1], description="Highest priority that its calls may have."
    )


class ScalerSection(Section):
    """The scaler agent, which starts and stops the replicas under `[[elastic]]`. Times are wall seconds."""

    policy: str = Field(DEFAULT_SCALING_POLICY, description="Scaling policy; docs/scaling.md says which there are.")
    parameters: dict[str, FiniteFloat] = Field({}, description="Parameters of the policy.")
    every_s: Seconds = Field(2.0, description="How often it plans.")
    up_cooldown_s: float = Field(4.0, ge=0.0, description="Rest after a start of replicas before the next.")
    down_cooldown_s: float = Field(300.0, ge=0.0, description="How long fewer must be wanted before one is stopped.")
    threshold: float = Field(0.1, ge=0.0, le=1.0, description="Smaller changes, relative to what is there, wait.")
    drain_s: Seconds = Field(60.0, description="How long a stopped replica may take for the calls that it has.")
    budget: float | None = Field(
        None, gt=0.0, description="Most that all elastic replicas together may cost at a time; one L40S is 1.0."
    )
    start_patience: float = Field(4.0, gt=1.0, description="A start that takes this many times the usual has failed.")
    start_floor_s: Seconds = Field(30.0, description="No start has failed before this.")
    backoff_most_s: Seconds = Field(300.0, description="Longest wait before a group that failed to start is tried.")
    alert_every_s: Seconds = Field(30.0, description="Least time between two alerts that a model is at its bound.")

    @model_validator(mode="after")
    def _known_policy(self) -> Self:
        try:
            make_scaling_policy(self.policy, self.parameters)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def settings(self, groups: tuple[ReplicaGroup, ...], startups: dict[str, list[float]]) -> ScalerSettings:
        """The agent's own form of these settings."""
        return ScalerSettings(groups=groups, startups=startups, **self.model_dump())


class PredictorSection(Section):
    """Who forecasts the work of a call before it is sent."""

    engine: Literal["neural", "empirical"] = Field(
        "neural",
        description="Trained networks that read the prompt, or plain statistics of calls that are alike. The latter "
        "stand in for the former as well, where these are missing, slow or wrong.",
    )
    encoder: Literal["hashed", "sentence", "isomorphic"] = Field(
        "hashed",
        description="What reads the prompt: within the call's way (hashed), or a slower one beside it whose word "
        "replaces the first forecast while the call waits or runs.",
    )
    weights: Path | None = Field(None, description="Folder of trained weights; none for those that ship.")
    encoder_weights: Path | None = Field(
        None,
        description="Folder that `swarmx train length --encoder` wrote for the slower encoder; none ships.",
    )
    budget_ms: float = Field(
        2.0,
        gt=0.0,
        le=1000.0,
        description="CPU time that a forecast may take; one that often takes more is replaced for a while.",
    )
    rest_s: Seconds = Field(30.0, description="How long a predictor that fails or is too slow rests.")
    refine_within_s: Seconds = Field(
        5.0, description="After this long a slower encoder does not read a prompt any more."
    )
    adapt: bool = Field(
        True, description="Learn from what calls come to, as they end; else forecasts rest on the weights alone."
    )
    paths: bool = Field(
        False,
        description="Tell the router how long each workflow still takes by the structure head; it counts on its own "
        "means by kind and role otherwise, with which its policy did better in simulation.",
    )
    retrain: bool = Field(True, description="Train again, in another process, when forecasts have drifted.")
    curves_every_s: Seconds = Field(
        1.0,
        description="How often at most a replica's service curve is computed anew; it is when its load has changed.",
    )


class GuardSection(Section):
    """What operators and the coordinator may change at most, and how long a proposal waits."""

    approval_s: Seconds = Field(900.0, description="How long a proposal waits for approve or deny.")
    verify_s: Seconds = Field(60.0, description="How long after a change its effect is judged.")
    replicas_step: int = Field(2, ge=1, description="Replicas that one change of the coordinator adds or takes away.")
    bounds_step: int = Field(2, ge=1, description="How far one change of the coordinator moves a bound.")
    parameter_factor: float = Field(2.0, ge=1.0, description="By which factor it changes a parameter at most.")
    coordinator_changes_per_hour: int = Field(12, ge=0, description="Changes that it may make an hour.")
    people_changes_per_hour: int = Field(240, ge=1, description="Changes that all people together may make an hour.")
    max_cost_rate: float | None = Field(
        None,
        gt=0.0,
        description="Most that the fleet could cost after a single change, bounds counted as used; one L40S is 1.0. "
        "It judges changes one at a time; `scaler.budget` limits what the scaler starts.",
    )
    max_open: int = Field(20, ge=1, description="Proposals and suggestions of the coordinator that may wait at a time.")
    cooldown_s: dict[str, float] = Field({}, description="Rest between two uses of a tool, by tool, in its place.")
    per_hour: dict[str, int] = Field({}, description="Uses of a tool an hour, by tool, in place of its own number.")
    auto_irreversible: tuple[str, ...] = Field(
        (), description="Irreversible tools that the coordinator may use unasked in mode auto."
    )

    def settings(self) -> GuardSettings:
        """The guard's own form of these settings."""
        return GuardSettings(**self.model_dump(exclude={"approval_s", "verify_s"}))

    @model_validator(mode="after")
    def _sound(self) -> Self:
        try:
            self.settings()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class CoordinatorSection(Section):
    """The LLM coordinator: a slow loop that reads figures, remembers episodes and proposes changes."""

    engine: Literal["off", "rules", "openai", "vllm"] = Field(
        "rules",
        description="Who thinks: nobody, the built-in rules, a model behind `url`, or a vLLM that SwarmX starts here.",
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+(/[^\s]*)?$",
        description="Base URL of an OpenAI-compatible server, without /v1.",
    )
    model: str = Field("qwen2.5-coder-0.5b", description="Name of the model there.")
    folder: Path = Field(
        Path(".models/qwen2.5-coder-0.5b-instruct"), description="Folder of the model that a vLLM here serves."
    )
    key_variable: str | None = Field(None, description="Environment variable that holds the key of that server.")
    mode: Mode = Field("review", description="What it may do: observe, suggest, review (an operator approves) or auto.")
    modes: dict[str, Mode] = Field({}, description="The same for single tools, such as `set_replica_bounds`.")
    every_s: Seconds = Field(300.0, description="How often it looks without being woken by an alert.")
    gap_s: Seconds = Field(15.0, description="Least time between two turns.")
    deadline_s: Seconds = Field(90.0, description="How long the model may take for a turn; then the rules decide.")
    breaker_s: Seconds = Field(900.0, description="How long it only observes after its proposals failed repeatedly.")

    @model_validator(mode="after")
    def _has_url(self) -> Self:
        if self.engine == "openai" and self.url is None:
            raise ValueError('coordinator: engine = "openai" needs url, such as http://127.0.0.1:8000.')
        return self


class WatchSection(Section):
    """How replicas are observed."""

    every_s: Seconds = Field(1.0, description="How often each replica's /metrics is read.")
    timeout_s: Seconds = Field(2.0, description="How long an answer may take.")
    failures: int = Field(3, ge=1, description="Failed reads in a row after which a replica counts as gone.")


class WorkflowSection(Section):
    """Workflows."""

    transparent_idle_s: Seconds = Field(
        600.0, description="Silence after which a workflow known only from its headers counts as finished."
    )
    traces: bool = Field(
        False,
        description="Calls of one W3C trace belong together, where no header names their workflow or session; for "
        "agents whose calls share one.",
    )


class EmulationSection(Section):
    """All emulated replicas together."""

    time_scale: float = Field(1.0, gt=0.0, le=1000.0, description="How many times faster than real they run.")
    seed: int = Field(0, ge=0, description="Seed of what they answer.")


class Settings(Section):
    """Everything that can be set."""

    server: ServerSection = ServerSection()
    state: StateSection = StateSection()
    router: RouterSection = RouterSection()
    tenants: dict[TenantName, TenantSection] = Field({})
    prices: dict[ModelName, PriceEntry] = Field({})
    scaler: ScalerSection = ScalerSection()
    predictor: PredictorSection = PredictorSection()
    guard: GuardSection = GuardSection()
    coordinator: CoordinatorSection = CoordinatorSection()
    watch: WatchSection = WatchSection()
    workflows: WorkflowSection = WorkflowSection()
    emulation: EmulationSection = EmulationSection()
    ray: RaySection = RaySection()
    replicas: tuple[StaticReplica, ...] = ()
    emulated: tuple[EmulatedReplicas, ...] = ()
    elastic: tuple[ElasticReplicas, ...] = ()
    tools: tuple[ToolReplicasEntry, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [replica.id for replica in self.replicas] + [i for group in self.emulated for i in group.ids()]
        ids += [entry.id for entry in self.tools if entry.url is not None]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"replica ids must be unique, {', '.join(twice)} occurs more than once.")
        groups = [(e.model, e.device) for e in self.emulated] + [(e.model, e.device) for e in self.elastic]
        for model, device in [(g.model, g.device) for g in self.elastic]:
            if groups.count((model, device)) > 1:
                raise ValueError(f"elastic: {model} on {device} is named twice; one entry with a larger min will do.")
        kinds: dict[str, str] = {}
        entries: tuple[StaticReplica | EmulatedReplicas | ElasticReplicas, ...] = (
            *self.replicas,
            *self.emulated,
            *self.elastic,
        )
        for model, kind in ((entry.model, entry.kind) for entry in entries):
            if kinds.setdefault(model, kind) != kind:
                raise ValueError(f"a model has one kind, {model} is given both {kind} and {kinds[model]}.")
        for group in self.elastic:
            start_s = group.start_s / (self.emulation.time_scale if group.provider == "emulated" else 1.0)
            if start_s >= self.router.queue_timeout_s:  # or the first calls of a cold model are always refused
                raise ValueError(
                    f"router.queue_timeout_s is {self.router.queue_timeout_s:g}, it must be longer than a start of "
                    f"{group.group_id}, {start_s:g} s."
                )
        return self


ENTRIES: dict[str, type[BaseModel]] = {
    "tenants": TenantSection,
    "prices": PriceEntry,
    "replicas": StaticReplica,
    "emulated": EmulatedReplicas,
    "elastic": ElasticReplicas,
    "tools": ToolReplicasEntry,
}


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
            item = ENTRIES[section]
            entries, table = (value.values(), f"{section}.NAME") if isinstance(value, dict) else (value, f"{section}[]")
            for name, info in item.model_fields.items():
                values = [str(getattr(entry, name)) for entry in entries]
                yield f"{table}.{name}", ", ".join(values), info.description or ""


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
        if name not in model.model_fields:  # the name of an entry, such as a tenant's
            continue
        annotation: Any = model.model_fields[name].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0] if inner else annotation
    return list(model.model_fields)

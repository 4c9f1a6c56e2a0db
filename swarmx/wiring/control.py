"""Puts the slow side together: desk, coordinator, console, and the model behind them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from swarmx.config import CoordinatorSection, Settings
from swarmx.core.actions import Action, Cordon, Deploy, Drain
from swarmx.core.audit import Report
from swarmx.core.control import Actor, CoordinatorStatus, Via
from swarmx.core.errors import ConfigError
from swarmx.core.messages import Message
from swarmx.core.ports import ControlStore, LanguageModel
from swarmx.core.words import near
from swarmx.gateway.telemetry import Telemetry
from swarmx.llm_coordinator.prompt import Prompts, templates_folder
from swarmx.llm_coordinator.situation import DIMENSION
from swarmx.memory.audit import AuditLog
from swarmx.memory.lazy import LazyVectors
from swarmx.memory.vectors import open_vectors
from swarmx.providers.coordinator_model import CoordinatorModel
from swarmx.runtime.chooser import Chooser
from swarmx.runtime.clock import Clock
from swarmx.runtime.console import Console
from swarmx.runtime.coordinator import Coordinator, Turn
from swarmx.runtime.desk import Desk
from swarmx.runtime.fleet import Fleet
from swarmx.runtime.model import OpenAiModel
from swarmx.runtime.overview import Overview
from swarmx.runtime.sentence_reader import SentenceReader
from swarmx.runtime.switchboard import Observer
from swarmx.tools.guard import Guard
from swarmx.tools.registry import Registry, make_registry
from swarmx.wiring.catalogue import catalogue
from swarmx.wiring.tasks import running_task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """What the gateway offers to operators."""

    desk: Desk
    console: Console
    status: Callable[[], CoordinatorStatus]


async def control_plane(
    settings: Settings,
    stack: AsyncExitStack,
    *,
    clock: Clock,
    control: ControlStore,
    audit: AuditLog,
    overview: Overview,
    fleet: Fleet,
    telemetry: Telemetry,
    check_audit: Callable[[], Awaitable[Report]],
    post: Callable[[Message], None],
    observers: list[Observer],
) -> ControlPlane:
    """Everything started, to be stopped by `stack`. Raises ConfigError."""
    policies = catalogue()
    registry = make_registry(policies)
    _check_names(settings, registry)
    coordinator: Coordinator | None = None

    def act(action: Action, actor: Actor, via: Via, intent_seq: int) -> None:
        if not isinstance(action, Deploy | Drain | Cordon):
            raise TypeError(f"no tool may ask for {type(action).__name__}")
        fleet.begin(action, actor=actor, via=via, intent_seq=intent_seq)

    desk = Desk(
        registry=registry,
        guard=Guard(settings.guard.settings()),
        store=control,
        audit=audit,
        view=overview.view,
        post=post,
        act=act,
        clock=clock,
        approval_s=settings.guard.approval_s,
        verify_s=settings.guard.verify_s,
    )
    desk.on_change.append(telemetry.proposal_changed)
    await desk.open()
    stack.push_async_callback(desk.close)
    await stack.enter_async_context(running_task(desk.run(), name="desk"))

    wanted = settings.coordinator
    model, is_up = await _model(wanted, settings.state.dir / "logs", stack)

    def status() -> CoordinatorStatus:
        return CoordinatorStatus(
            engine=wanted.engine,
            model=None if model is None else model.name,
            is_up=is_up(),
            mode=wanted.mode,
            modes=wanted.modes,
            observes_until_s=None if coordinator is None else coordinator.observes_until_s,
        )

    reader = None
    if model is not None:
        reader = SentenceReader(
            model=model,
            registry=registry,
            catalogue=policies,
            templates=templates_folder(),
            deadline_s=wanted.deadline_s,
        )
    console = Console(
        overview=overview.view,
        desk=desk,
        audit=audit,
        check=check_audit,
        policies=policies.policies,
        reader=reader,
    )
    if wanted.engine == "off":
        return ControlPlane(desk=desk, console=console, status=status)

    def turn_ended(turn: Turn) -> None:
        telemetry.turn_ended(turn.source, turn.prompt_tokens, turn.output_tokens)

    vectors = LazyVectors(lambda: open_vectors(settings.state.dir / "vectors", DIMENSION))
    stack.push_async_callback(vectors.close)
    coordinator = Coordinator(
        desk=desk,
        overview=overview.view,
        chooser=Chooser(
            model=model,
            prompts=Prompts(templates_folder()),
            tools=registry.tools,
            catalogue=policies,
            step=settings.guard.bounds_step,
            deadline_s=wanted.deadline_s,
        ),
        vectors=vectors,
        store=control,
        audit=audit,
        modes=wanted.modes,
        mode=wanted.mode,
        clock=clock,
        every_s=wanted.every_s,
        min_gap_s=wanted.gap_s,
        breaker_s=wanted.breaker_s,
        on_turn=turn_ended,
    )
    observers.append(coordinator.observe)
    desk.on_change.append(coordinator.changed)
    stack.push_async_callback(coordinator.close)
    await stack.enter_async_context(running_task(vectors.open(), name="vector memory"))
    await stack.enter_async_context(running_task(coordinator.run(), name="coordinator"))
    return ControlPlane(desk=desk, console=console, status=status)


def _check_names(settings: Settings, registry: Registry) -> None:
    """Raises ConfigError for a tool in the settings that does not exist: it would bind nothing."""
    guard = settings.guard
    named: dict[str, Iterable[str]] = {
        "coordinator.modes": settings.coordinator.modes,
        "guard.cooldown_s": guard.cooldown_s,
        "guard.per_hour": guard.per_hour,
        "guard.auto_irreversible": guard.auto_irreversible,
    }
    for where, names in named.items():
        for name in names:
            if name not in registry.tools:
                known = ", ".join(registry.tools)
                raise ConfigError(f"{where}: there is no tool {name!r}; there are {known}.{near(name, registry.tools)}")


async def _model(
    wanted: CoordinatorSection, logs: Path, stack: AsyncExitStack
) -> tuple[LanguageModel | None, Callable[[], bool]]:
    """The model that the coordinator and the console ask, if there is one, and whether it can be asked now."""
    if wanted.engine in ("off", "rules"):
        return None, lambda: False
    if wanted.engine == "vllm":
        server = CoordinatorModel(model_dir=wanted.folder, name=wanted.model, log=logs / "coordinator.log")
        await stack.enter_async_context(running_task(server.run(), name="coordinator's model"))
        model = OpenAiModel(url=lambda: server.url, name=wanted.model)
        stack.push_async_callback(model.close)
        return model, lambda: server.url is not None
    model = OpenAiModel(url=lambda: wanted.url, name=wanted.model, key_variable=wanted.key_variable)
    stack.push_async_callback(model.close)
    return model, lambda: True

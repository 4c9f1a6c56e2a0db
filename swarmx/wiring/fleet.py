"""The fleet that the settings ask for: fixed replicas, groups that the scaler may draw on, and their providers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from swarmx.config import ElasticReplicas, EmulatedReplicas, Settings
from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import ReplicaGroup
from swarmx.core.ports import ElasticProvider, Provider
from swarmx.providers.comfyui_servers import ComfyUIProvider, ComfyUISpec
from swarmx.providers.emulated.provider import EmulatedGroup, EmulatedProvider, EmulatedSpec
from swarmx.providers.process import CPU_PROFILE, ProcessProvider
from swarmx.providers.ray.provider import RayProvider
from swarmx.providers.static import UNKNOWN_IMAGE, UNKNOWN_TEXT, StaticProvider, static_replica
from swarmx.providers.tool_replicas import read_pool, tool_profile
from swarmx.wiring.toolbox import ToolPools


def fixed_providers(settings: Settings, emulated: EmulatedProvider | None, tools: ToolPools) -> Sequence[Provider]:
    """Providers of the replicas that are there from the start."""
    static = [
        static_replica(
            replica_id=r.id,
            model=r.model,
            kind=r.kind,
            device=r.device,
            url=r.url,
            profile=r.profile,
            priorities=r.priorities,
        )
        for r in settings.replicas
    ]
    found: list[Provider] = [StaticProvider([*static, *tools.elsewhere])]
    return found + [provider for provider in (emulated, tools.here) if provider is not None]


def groups(settings: Settings) -> tuple[ReplicaGroup, ...]:
    """What the scaler may draw on; profiles and start-up times are wall seconds. Raises ConfigError."""
    return tuple(_group(entry, settings.emulation.time_scale) for entry in settings.elastic)


def emulated_provider(settings: Settings) -> EmulatedProvider | None:
    """The emulator of fixed and elastic replicas, if there are any. Raises ConfigError."""
    elastic = {e.group_id: e for e in settings.elastic if e.provider == "emulated"}
    if not settings.emulated and not elastic:
        return None
    specs = [spec for entry in settings.emulated for spec in _specs(entry)]
    return EmulatedProvider(
        specs,
        groups={
            name: EmulatedGroup(profile=emulated_profile(entry), size_class=entry.size_class, start_s=entry.start_s)
            for name, entry in elastic.items()
        },
        time_scale=settings.emulation.time_scale,
        seed=settings.emulation.seed,
    )


def elastic_providers(
    settings: Settings,
    emulated: EmulatedProvider | None,
    tools: ToolPools,
    logs: Path,
    ray: RayProvider | None = None,
) -> Mapping[str, ElasticProvider]:
    """Who starts and stops the replicas of a group, by the provider's name; where there is Ray, that does."""
    if ray is not None:
        return {entry.provider: ray for entry in settings.elastic}
    found: dict[str, ElasticProvider] = {}
    if tools.here is not None:
        found["tools"] = tools.here
    if emulated is not None:
        found["emulated"] = emulated
    folders = {e.group_id: e.folder for e in settings.elastic if e.provider == "process" and e.folder is not None}
    if folders:
        serving = {e.group_id: e.gpu_serving for e in settings.elastic if e.on_gpus}
        found["process"] = ProcessProvider(models=folders, logs=logs, serving=serving)
    comfy = {
        e.group_id: ComfyUISpec(folder=e.folder, graph=e.graph, python=e.python, options=e.options)
        for e in settings.elastic
        if e.provider == "comfyui" and e.folder is not None and e.graph is not None
    }
    if comfy:
        found["comfyui"] = ComfyUIProvider(groups=comfy, logs=logs, work=logs.parent / "comfyui-servers")
    return found


def _group(entry: ElasticReplicas, time_scale: float) -> ReplicaGroup:
    if entry.provider == "emulated":
        profile, start_s = emulated_profile(entry).scaled(time_scale), entry.start_s / time_scale
    elif entry.file is not None:
        profile, start_s = tool_profile(entry.model, read_pool(entry.file).settings.slots), entry.start_s
    else:
        unknown = UNKNOWN_IMAGE if entry.kind == "image" else UNKNOWN_TEXT if entry.on_gpus else CPU_PROFILE
        known = profiles().get((entry.model, entry.device), unknown)
        profile = msgspec.structs.replace(
            known, model=entry.model, device=entry.device, max_batch=entry.slots or known.max_batch
        )
        start_s = entry.start_s
    return ReplicaGroup(
        group_id=entry.group_id,
        model=entry.model,
        kind=entry.kind,
        device=entry.device,
        provider=entry.provider,
        profile=profile,
        min_replicas=entry.min,
        max_replicas=entry.max,
        limit=entry.limit,
        start_s=start_s,
        engine_order=entry.engine_order,
    )


def _specs(entry: EmulatedReplicas) -> Sequence[EmulatedSpec]:
    profile = emulated_profile(entry)
    return [
        EmulatedSpec(
            replica_id=replica_id,
            model=entry.model,
            kind=entry.kind,
            device=entry.device,
            size_class=entry.size_class,
            profile=profile,
            engine_order=entry.engine_order,
        )
        for replica_id in entry.ids()
    ]


def emulated_profile(entry: EmulatedReplicas | ElasticReplicas) -> EngineProfile:
    """The fitted profile, in real seconds. Raises ConfigError where there is none."""
    profile = profiles().get((entry.model, entry.device))
    if profile is None:
        devices = sorted(device for model, device in profiles() if model == entry.model)
        models = sorted({model for model, _ in profiles()})
        known = f"{entry.model} is profiled on {', '.join(devices)}" if devices else f"models are {', '.join(models)}"
        raise ConfigError(f"emulated: there is no profile of {entry.model!r} on {entry.device!r}; {known}.")
    if (profile.max_batch == 1) != (entry.kind == "image"):
        raise ConfigError(
            f"emulated: {entry.model!r} serves {'images' if profile.max_batch == 1 else 'text'}; set kind."
        )
    return profile if entry.slots is None else msgspec.structs.replace(profile, max_batch=entry.slots)

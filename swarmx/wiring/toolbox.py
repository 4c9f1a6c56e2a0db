"""The pools of tools that the settings ask for: who runs their replicas, and who knows what they offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmx.config import Settings
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import Replica
from swarmx.providers.tool_replicas import ToolPool, ToolReplicas, read_pool, token_from, tool_replica
from swarmx.runtime.tool_catalogue import ToolCatalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPools:
    """`here` runs the replicas of this host, if there are any; `elsewhere` are those that somebody else runs.

    `token_of` says what a replica wants to be shown, None for one that wants nothing.
    """

    here: ToolReplicas | None
    elsewhere: Sequence[Replica]
    catalogue: ToolCatalogue
    token_of: Callable[[str], str | None]


def tool_pools(
    settings: Settings, logs: Path, *, token_on_ray: Callable[[str], str | None] = lambda replica_id: None
) -> ToolPools:
    """All pools. Raises ConfigError."""
    pools = _pools(settings)
    tokens: dict[str, str] = {}
    elsewhere: list[Replica] = []
    for entry in settings.tools:
        if entry.url is not None:
            tokens[entry.id] = token_from(entry.token_variable, replica_id=entry.id)
            elsewhere.append(
                tool_replica(entry.id, pool=entry.pool, url=entry.url, slots=entry.slots, provider="static")
            )
    here = ToolReplicas(pools, logs=logs) if pools else None
    names = {*pools, *(replica.model for replica in elsewhere)}
    _check(settings, pools, names)

    def token_of(replica_id: str) -> str | None:
        own = None if here is None else here.token_of(replica_id)
        return own or tokens.get(replica_id) or token_on_ray(replica_id)

    catalogue = ToolCatalogue(names, token_of=token_of)
    return ToolPools(here=here, elsewhere=elsewhere, catalogue=catalogue, token_of=token_of)


def _pools(settings: Settings) -> dict[str, ToolPool]:
    """Those of which replicas run here, by name. Raises ConfigError."""
    found = [read_pool(entry.file, count=entry.count) for entry in settings.tools if entry.file is not None]
    for group in settings.elastic:
        if group.file is not None:
            pool = read_pool(group.file)
            if group.model != pool.name:
                raise ConfigError(f"elastic: {group.file} has the pool {pool.name!r}, and not {group.model!r}.")
            found.append(pool)
    names = [pool.name for pool in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tools: the pool {name!r} is named twice; one entry with a larger count or min will do.")
    return dict(zip(names, found, strict=True))


def _check(settings: Settings, pools: dict[str, ToolPool], names: set[str]) -> None:
    models = {replica.model for replica in settings.replicas} | {group.model for group in settings.emulated}
    both = sorted(names & (models | {group.model for group in settings.elastic if group.kind != "tool"}))
    if both:
        raise ConfigError(f"tools: {', '.join(both)} is the name of a model, a pool needs another one.")
    for name, pool in pools.items():
        if pool.longest_s >= settings.router.call_timeout_s:  # or the router would take it for a silent replica
            raise ConfigError(
                f"tools: a tool of {name!r} may take {pool.longest_s:g} s; router.call_timeout_s must be longer, it is "
                f"{settings.router.call_timeout_s:g}."
            )
        if not pool.count and pool.longest_s > settings.scaler.drain_s:  # a drain would cut it off
            raise ConfigError(
                f"tools: a tool of {name!r} may take {pool.longest_s:g} s; scaler.drain_s must be as long, it is "
                f"{settings.scaler.drain_s:g}."
            )

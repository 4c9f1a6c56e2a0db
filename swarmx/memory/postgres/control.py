"""Proposals, the coordinator's episodes and start-up times in PostgreSQL, beside the workflows."""

# ruff: noqa: S608  # statements are put together from fixed tables; values are always bound

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import asyncpg
import msgspec

from swarmx.core.control import Episode, Proposal, ProposalState
from swarmx.core.records import SCHEMA_VERSION
from swarmx.memory.postgres.store import PostgresStore
from swarmx.memory.rows import KEPT_STARTUPS, NEWEST, checked, decoded

T = TypeVar("T", Proposal, Episode)
_SAVE_PROPOSAL = (
    "INSERT INTO proposals VALUES ($1, $2, $3, $4, $5) ON CONFLICT (proposal_id) DO UPDATE SET "
    "at_s = excluded.at_s, state = excluded.state, body = excluded.body, schema_version = excluded.schema_version"
)
_SAVE_EPISODE = (
    "INSERT INTO episodes VALUES ($1, $2, $3, $4) ON CONFLICT (episode_id) DO UPDATE SET "
    "at_s = excluded.at_s, body = excluded.body, schema_version = excluded.schema_version"
)


class PostgresControl:
    """The ControlStore port over an open store, which it shares with its other users."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store

    async def save_proposal(self, proposal: Proposal) -> None:
        """Insert, or replace by id."""
        body = msgspec.json.encode(proposal)
        await self._save(_SAVE_PROPOSAL, proposal.proposal_id, proposal.at_s, proposal.state, body, SCHEMA_VERSION)

    async def proposal(self, proposal_id: str) -> Proposal | None:
        """One proposal, or None if it is unknown."""
        found = await self._bodies("proposals WHERE proposal_id = $1", (proposal_id,), Proposal)
        return found[0] if found else None

    async def proposals(
        self, *, states: Sequence[ProposalState] | None, limit: int, before: tuple[float, str] | None = None
    ) -> list[Proposal]:
        """Those in one of the states, or all (None), newest first; `limit` is 1 to 1000."""
        tail = (
            "proposals WHERE ($1::text[] IS NULL OR state = ANY($1)) AND (at_s, proposal_id) < ($2, $3) "
            "ORDER BY at_s DESC, proposal_id DESC LIMIT $4"
        )
        wanted = None if states is None else list(states)
        return await self._bodies(tail, (wanted, *(before or NEWEST), checked(limit, "proposals")), Proposal)

    async def save_episode(self, episode: Episode) -> None:
        """Insert, or replace by id."""
        await self._save(_SAVE_EPISODE, episode.episode_id, episode.at_s, msgspec.json.encode(episode), SCHEMA_VERSION)

    async def episode(self, episode_id: str) -> Episode | None:
        """One episode, or None if it is unknown."""
        found = await self._bodies("episodes WHERE episode_id = $1", (episode_id,), Episode)
        return found[0] if found else None

    async def episodes(self, *, limit: int, before: tuple[float, str] | None = None) -> list[Episode]:
        """Newest first; `limit` is 1 to 1000."""
        tail = "episodes WHERE (at_s, episode_id) < ($1, $2) ORDER BY at_s DESC, episode_id DESC LIMIT $3"
        return await self._bodies(tail, (*(before or NEWEST), checked(limit, "episodes")), Episode)

    async def record_startup(self, group_id: str, device: str, seconds: float, at_s: float) -> None:
        """Keep how long a replica of the group took to become ready; the last 20 of a group are kept."""

        async def write(connection: asyncpg.Connection) -> None:
            await connection.execute(
                "INSERT INTO startups (group_id, device, seconds, at_s, schema_version) VALUES ($1, $2, $3, $4, $5)",
                group_id,
                device,
                seconds,
                at_s,
                SCHEMA_VERSION,
            )
            await connection.execute(
                "DELETE FROM startups WHERE group_id = $1 AND startup_id NOT IN "
                "(SELECT startup_id FROM startups WHERE group_id = $1 ORDER BY startup_id DESC LIMIT $2)",
                group_id,
                KEPT_STARTUPS,
            )

        await self._store.write(write)

    async def startups(self) -> dict[str, list[float]]:
        """Seconds to ready by group, oldest first."""
        seen: dict[str, list[float]] = {}
        for group_id, seconds in await self._store.read(
            lambda connection: connection.fetch("SELECT group_id, seconds FROM startups ORDER BY startup_id")
        ):
            seen.setdefault(group_id, []).append(seconds)
        return seen

    async def _save(self, statement: str, *values: object) -> None:
        await self._store.write(lambda connection: connection.execute(statement, *values))

    async def _bodies(self, tail: str, values: tuple[object, ...], kind: type[T]) -> list[T]:
        found = await self._store.read(lambda connection: connection.fetch(f"SELECT body FROM {tail}", *values))
        return [decoded(row[0], kind) for row in found]

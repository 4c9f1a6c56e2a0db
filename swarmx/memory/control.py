"""Proposals, the coordinator's episodes and start-up times, in the same database as the workflows."""

# ruff: noqa: S608  # statements are put together from fixed tables; values are always bound

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from swarmx.core.control import Episode, Proposal, ProposalState
from swarmx.core.records import SCHEMA_VERSION
from swarmx.memory.rows import KEPT_STARTUPS, NEWEST, checked, decoded
from swarmx.memory.sqlite import SqliteStore

T = TypeVar("T", Proposal, Episode)
_BEFORE = "(at_s, {0}) < (?, ?) ORDER BY at_s DESC, {0} DESC"


class SqliteControl:
    """The ControlStore port over an open store, which it shares with its other users."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    async def save_proposal(self, proposal: Proposal) -> None:
        """Insert, or replace by id."""
        body = msgspec.json.encode(proposal)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO proposals VALUES (?,?,?,?,?)",
                (proposal.proposal_id, proposal.at_s, proposal.state, body, SCHEMA_VERSION),
            )

        await self._store.write(write)

    async def proposal(self, proposal_id: str) -> Proposal | None:
        """One proposal, or None if it is unknown."""
        found = await self._bodies("proposals WHERE proposal_id = ?", (proposal_id,), Proposal)
        return found[0] if found else None

    async def proposals(
        self, *, states: Sequence[ProposalState] | None, limit: int, before: tuple[float, str] | None = None
    ) -> list[Proposal]:
        """Those in one of the states, or all (None), newest first; `limit` is 1 to 1000."""
        wanted = "1" if states is None else f"state IN ({', '.join('?' * len(states))})"
        tail = f"proposals WHERE {wanted} AND {_BEFORE.format('proposal_id')} LIMIT ?"
        return await self._bodies(tail, (*(states or ()), *(before or NEWEST), checked(limit, "proposals")), Proposal)

    async def save_episode(self, episode: Episode) -> None:
        """Insert, or replace by id."""
        body = msgspec.json.encode(episode)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO episodes VALUES (?,?,?,?)",
                (episode.episode_id, episode.at_s, body, SCHEMA_VERSION),
            )

        await self._store.write(write)

    async def episode(self, episode_id: str) -> Episode | None:
        """One episode, or None if it is unknown."""
        found = await self._bodies("episodes WHERE episode_id = ?", (episode_id,), Episode)
        return found[0] if found else None

    async def episodes(self, *, limit: int, before: tuple[float, str] | None = None) -> list[Episode]:
        """Newest first; `limit` is 1 to 1000."""
        tail = f"episodes WHERE {_BEFORE.format('episode_id')} LIMIT ?"
        return await self._bodies(tail, (*(before or NEWEST), checked(limit, "episodes")), Episode)

    async def record_startup(self, group_id: str, device: str, seconds: float, at_s: float) -> None:
        """Keep how long a replica of the group took to become ready; the last 20 of a group are kept."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO startups (group_id, device, seconds, at_s, schema_version) VALUES (?,?,?,?,?)",
                (group_id, device, seconds, at_s, SCHEMA_VERSION),
            )
            connection.execute(
                "DELETE FROM startups WHERE group_id = ? AND startup_id NOT IN "
                "(SELECT startup_id FROM startups WHERE group_id = ? ORDER BY startup_id DESC LIMIT ?)",
                (group_id, group_id, KEPT_STARTUPS),
            )

        await self._store.write(write)

    async def startups(self) -> dict[str, list[float]]:
        """Seconds to ready by group, oldest first."""

        def read(connection: sqlite3.Connection) -> dict[str, list[float]]:
            seen: dict[str, list[float]] = {}
            for group_id, seconds in connection.execute("SELECT group_id, seconds FROM startups ORDER BY startup_id"):
                seen.setdefault(group_id, []).append(seconds)
            return seen

        return await self._store.read(read)

    async def _bodies(self, tail: str, values: tuple[object, ...], kind: type[T]) -> list[T]:
        def read(connection: sqlite3.Connection) -> list[bytes]:
            return [row[0] for row in connection.execute(f"SELECT body FROM {tail}", values)]

        return [decoded(body, kind) for body in await self._store.read(read)]

"""Workflows that arrive at given times, and the list of what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec

from swarmx.client import Api


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow to submit, `at_s` wall seconds after the start."""

    at_s: float
    kind: str
    spec: dict[str, Any]


async def submit(api: Api, todo: Sequence[Arrival], start_s: float) -> None:
    """Submit each at its time; `start_s` is on the monotonic clock."""

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, start_s + arrival.at_s - time.monotonic()))
        await api.post("/api/v1/workflows", json=arrival.spec)

    await asyncio.gather(*(one(arrival) for arrival in todo))


async def all_workflows(api: Api) -> list[dict[str, Any]]:
    """Every workflow that the server knows, newest first."""
    rows: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = await api.get("/api/v1/workflows", limit=200, cursor=cursor)
        rows += page["workflows"]
        cursor = page["next_cursor"]
        if cursor is None:
            return rows


async def voids(replicas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Replicas whose emulation could not keep up with its own clock, and why: their times mean nothing."""
    found: dict[str, str] = {}
    async with aiohttp.ClientSession() as session:
        for row in replicas:
            if not row["emulated"] or row["state"] in ("starting", "gone"):
                continue
            with contextlib.suppress(aiohttp.ClientError):  # it may have been drained since it was listed
                async with session.get(f"{row['url']}/emulator/report") as response:
                    said = await response.json()
                if said["void"]:
                    found[row["replica_id"]] = said["why"]
    return found

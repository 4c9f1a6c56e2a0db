"""A whole SwarmX with one model that answers and one that never does, for what happens to workflows meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.fleet import Peer, peers, static, until
from tests.gateway.whole import Whole, whole

API = "/api/v1/workflows"
CODER, STUCK = "coder", "stuck"
INSTANT = {"name": "instant", "nodes": {"a": {"kind": "tool", "function": "upper", "args": {"text": "x"}}}}
ASK = {"name": "ask", "nodes": {"a": {"kind": "llm", "model": CODER, "prompt": "Why?"}}}
WAITS = {
    "name": "waits",
    "signals": {"approve": {}},
    "nodes": {"a": {"kind": "tool", "function": "upper", "args": {"text": "{{ signals.approve.who }}"}}},
}
HANGS = {"name": "hangs", "nodes": {"a": {"kind": "llm", "model": STUCK, "prompt": "Why?"}}}


@dataclass(slots=True, kw_only=True)
class World:
    """Replica `answers` is of model `coder`, replica `hangs` of model `stuck`."""

    whole: Whole
    answers: Peer
    hangs: Peer


@asynccontextmanager
async def world_in(folder: Path, **more: Any) -> AsyncIterator[World]:
    """It runs as long as the block, with its state in the folder; `more` are settings."""
    async with peers(answers="fine", hangs="hang") as found:
        answers, hangs = found["answers"], found["hangs"]
        replicas = [static("coder-0", CODER, answers), static("stuck-0", STUCK, hangs)]
        async with whole(folder, replicas=replicas, **more) as running:
            yield World(whole=running, answers=answers, hangs=hangs)


async def submitted(client: httpx.AsyncClient, workflow: dict[str, Any], **inputs: Any) -> str:
    """The id of a workflow that was accepted."""
    reply = await client.post(API, json={"workflow": workflow, "inputs": inputs})
    assert reply.status_code == 202, reply.text
    workflow_id: str = reply.json()["workflow_id"]
    return workflow_id


async def ended(client: httpx.AsyncClient, workflow_id: str) -> dict[str, Any]:
    """The whole workflow, once it has ended."""
    reply = await client.get(f"{API}/{workflow_id}", headers={"prefer": "wait=30"})
    row: dict[str, Any] = reply.json()
    assert row["ended_at_s"] is not None, row
    return row


async def asked(peer: Peer, *, calls: int = 1) -> None:
    """Wait until the replica works on so many calls."""

    async def running() -> int:
        return peer.running

    await until(running, lambda count: count == calls)


def refused(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of a refusal."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = reply.json()
    assert body["status"] == status
    assert body["detail"]
    return body

"""A whole SwarmX inside the test's own process, asked without a socket; its replicas are peers of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from swarmx.config import Settings
from swarmx.core.control import Role
from swarmx.gateway.context import Context
from swarmx.wiring import running
from tests.e2e.fleet import peers, static, until

MODEL, ELASTIC = "coder", "qwen3-8b"


@dataclass(slots=True, kw_only=True)
class Whole:
    """The application, what it works with, and the folder that it writes."""

    app: FastAPI
    context: Context
    folder: Path

    def token(self, role: Role, tenant: str = "default") -> str:
        """The token of a new key that is named after its role, and numbered when there is one already."""
        taken = sum(key.role == role for key in self.context.keys.all())
        return self.context.keys.add(f"{role}-{taken}" if taken else role, role, tenant)

    def client(self, role: Role | None = None, tenant: str = "default") -> httpx.AsyncClient:
        """A client with a token of that role, or without any."""
        headers = {"authorization": f"Bearer {self.token(role, tenant)}"} if role is not None else {}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://swarmx.test", headers=headers, timeout=30.0
        )


@asynccontextmanager
async def whole(folder: Path, **more: Any) -> AsyncIterator[Whole]:
    """Two replicas of `coder` that are fixed, and a model that can have up to 4 and has none; `more` are settings."""
    async with peers(one="fine", two="fine") as found:
        settings = Settings.model_validate(
            {
                "state": {"dir": folder},
                "coordinator": {"engine": "off"},
                "watch": {"every_s": 0.1},
                "replicas": [static(f"{MODEL}-{number}", MODEL, peer) for number, peer in enumerate(found.values())],
                "elastic": [{"model": ELASTIC, "device": "l40s", "min": 0, "max": 2, "limit": 4}],
                **more,
            }
        )
        async with running(settings) as (app, context):

            async def ready() -> int:
                return context.book.ready()

            await until(ready, lambda count: count == 2)
            yield Whole(app=app, context=context, folder=folder)

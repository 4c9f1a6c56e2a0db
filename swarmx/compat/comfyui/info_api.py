"""The routes that tell what there is: node classes, models, servers, and why a job went where it went."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from swarmx.agents.counterfactual import explain_instead, instead
from swarmx.agents.explain import explain
from swarmx.agents.policies import check_policy
from swarmx.compat.comfyui.answers import answer, read_json
from swarmx.compat.comfyui.auth import require
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.relay import Relay
from swarmx.compat.comfyui.scheduling import Scheduler
from swarmx.compat.comfyui.server import ServerAway
from swarmx.compat.comfyui.servers import Servers
from swarmx.compat.comfyui.store import JobStore
from swarmx.compat.comfyui.trail import Trail
from swarmx.core.nouns import Decision

_HIDDEN = ("argv", "embedded_python")


class InfoRoutes:
    """All servers together answer as one."""

    def __init__(
        self,
        *,
        servers: Servers,
        book: NodeBook,
        scheduler: Scheduler,
        store: JobStore,
        relay: Relay,
        trail: Trail,
    ) -> None:
        self._servers = servers
        self._book = book
        self._scheduler = scheduler
        self._store = store
        self._relay = relay
        self._trail = trail

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/object_info", self.object_info),
            web.get("/object_info/{class_type}", self.one_class),
            web.get("/system_stats", self.system_stats),
            web.get("/features", self.features),
            web.get("/embeddings", self.embeddings),
            web.get("/models", self.model_folders),
            web.get("/models/{folder}", self.models),
            web.get("/extensions", self.extensions),
            web.post("/free", self.free),
            web.get("/swarmx/servers", self.servers),
            web.get("/swarmx/why/{prompt_id}", self.why),
            web.get("/v1/calls/{prompt_id}/why", self.why),  # where `swarmx why` asks
        ]

    async def object_info(self, request: web.Request) -> web.Response:
        require(request, "read")
        return answer(self._book.union)

    async def one_class(self, request: web.Request) -> web.Response:
        require(request, "read")
        name = request.match_info["class_type"]
        return answer({name: self._book.union[name]} if name in self._book.union else {})

    async def system_stats(self, request: web.Request) -> web.Response:
        """The system of the first server that is up, without its command line; the devices of all of them."""
        require(request, "read")
        found = [(name, self._servers.stats[name]) for name in self._servers if self._servers.is_up(name)]
        system: dict[str, Any] = {}
        devices: list[Any] = []
        for name, stats in found:
            if not system and isinstance(stats.get("system"), dict):
                system = {key: value for key, value in stats["system"].items() if key not in _HIDDEN}
            rows = stats.get("devices")
            devices += (
                [row | {"server": name} for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            )
        return answer({"system": system | {"argv": ["swarmx", "comfy"]}, "devices": devices})

    async def features(self, request: web.Request) -> web.Response:
        require(request, "read")
        return answer(self._relay.features)

    async def embeddings(self, request: web.Request) -> web.Response:
        require(request, "read")
        return answer(await self._all_of("/embeddings"))

    async def model_folders(self, request: web.Request) -> web.Response:
        require(request, "read")
        return answer(await self._all_of("/models"))

    async def models(self, request: web.Request) -> web.Response:
        """Models of one folder that any server has; 404 where no server has the folder."""
        require(request, "read")
        folder = request.match_info["folder"]
        if folder not in await self._all_of("/models"):
            raise web.HTTPNotFound
        return answer(await self._all_of(f"/models/{folder}"))

    async def extensions(self, request: web.Request) -> web.Response:
        """Scripts of the servers' own web pages, none of which are served here."""
        require(request, "read")
        return answer([])

    async def free(self, request: web.Request) -> web.Response:
        """Have every server free its memory."""
        key = require(request, "control")
        body = await read_json(request, 65_536)
        wanted = body if isinstance(body, dict) else {}
        up = [name for name in self._servers if self._servers.is_up(name)]
        await asyncio.gather(*(self._servers[name].free(wanted) for name in up), return_exceptions=True)
        for name in up:
            self._scheduler.states[name].forget()
        self._trail.asked(key, "free", {"servers": up})
        return web.Response()

    async def servers(self, request: web.Request) -> web.Response:
        """Every server: whether it is up, what it runs, and which models it should have in memory."""
        require(request, "read_all")
        rows = []
        for name in self._servers:
            state, running = self._scheduler.states.get(name), self._scheduler.running.get(name)
            rows.append(
                {
                    "name": name,
                    "up": self._servers.is_up(name),
                    "running": running.waiting.job.shown_id if running else None,
                    "resident": list(state.resident) if state else [],
                    "cached_nodes": len(state.cached) if state else 0,
                }
            )
        return answer({"servers": rows, "waiting": len(self._scheduler)})

    async def why(self, request: web.Request) -> web.Response:
        """Attempt by attempt: where a job went, and what spoke for it; with `policy`, also what that one had done."""
        key, prompt_id = require(request, "read"), request.match_info["prompt_id"]
        policy = request.query.get("policy")
        if policy is not None:
            check_policy(policy)
        if await self._store.job(prompt_id, key.sees) is None:
            raise web.HTTPNotFound
        decisions = await self._store.decisions(prompt_id)
        return answer({"call_id": prompt_id, "decisions": [_why(decision, policy) for decision in decisions]})

    async def _all_of(self, path: str) -> list[Any]:
        """The union of what the servers list at a path."""
        up = [self._servers[name] for name in self._servers if self._servers.is_up(name)]
        answers = await asyncio.gather(*(server.get(path) for server in up), return_exceptions=True)
        merged: dict[Any, None] = {}
        for found in answers:
            if isinstance(found, BaseException) and not isinstance(found, ServerAway):
                raise found
            if isinstance(found, list):
                merged |= dict.fromkeys(row for row in found if isinstance(row, str))
        return list(merged)


def _why(decision: Decision, policy: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"explanation": explain(decision), "decision": decision}
    if policy is not None:
        other = instead(decision, policy)
        row["instead"] = msgspec.to_builtins(other) | {"explanation": explain_instead(decision, other)}
    return row

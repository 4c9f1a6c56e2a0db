"""Puts a front together, and serves it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from swarmx.compat.comfyui.answers import BadRequest, refusal
from swarmx.compat.comfyui.auth import KEY, guard, hung_up_on, require
from swarmx.compat.comfyui.files import Files
from swarmx.compat.comfyui.files_api import FileRoutes
from swarmx.compat.comfyui.forecasts import JobForecaster, NodeForecaster
from swarmx.compat.comfyui.front import JobRoutes
from swarmx.compat.comfyui.graph import PREFIX
from swarmx.compat.comfyui.info_api import InfoRoutes
from swarmx.compat.comfyui.kept_costs import KeptCosts
from swarmx.compat.comfyui.kept_info import KeptInfo
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.quotas import Quotas
from swarmx.compat.comfyui.relay import Relay
from swarmx.compat.comfyui.runner import JobRunner
from swarmx.compat.comfyui.scheduling import Scheduler
from swarmx.compat.comfyui.servers import Servers
from swarmx.compat.comfyui.settings import FrontSettings
from swarmx.compat.comfyui.store import JobStore
from swarmx.compat.comfyui.trail import Trail
from swarmx.compat.comfyui.validation import error
from swarmx.core.errors import ConfigError, Forbidden, StoreError, SwarmXError, Unauthorized, Unavailable
from swarmx.gateway.keys import Keyring
from swarmx.runtime.clock import WallClock

log = logging.getLogger(__name__)

# Routes by which a server can be changed, or files of it read: none of them is passed on, and it is said why.
BLOCKED = (
    *("manager", "v2", "customnode", "snapshot", "externalmodel", "comfyui_manager", "internal", "userdata", "users"),
    *("settings", "experiment", "view_metadata", "workflow_templates", "global_subgraphs", "i18n"),
)
_STATUS: dict[type[SwarmXError], int] = {
    ConfigError: 400,
    Unauthorized: 401,
    Forbidden: 403,
    StoreError: 503,
    Unavailable: 503,
}


@asynccontextmanager
async def running(
    settings: FrontSettings, folder: Path, *, keys: Keyring | None, forecaster: JobForecaster | None = None
) -> AsyncIterator[web.Application]:
    """A front with its jobs recovered and its servers watched, in order, and stopped in the opposite one.

    It lives in the folder. Without `keys` it is open. Raises StoreError.
    """
    clock = WallClock()
    async with AsyncExitStack() as stack:
        store = JobStore(folder, keep=settings.keep)
        await store.open()
        stack.push_async_callback(store.close)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=True)
        )
        book = NodeBook(settings.allow, hidden=PREFIX)
        known = KeptInfo(folder)
        await known.read(book, [server.name for server in settings.servers])
        stack.push_async_callback(known.write, book)
        servers = Servers(settings, session, book)
        trail = Trail(folder if settings.audit else None)
        await trail.open()
        stack.push_async_callback(trail.close)
        store.on_decision = trail.decided
        kept = KeptCosts(folder)
        costs = await asyncio.to_thread(kept.read)
        stack.push_async_callback(kept.write, costs)
        files = Files(store, servers, settings.tenant)
        await files.open()
        scheduler = Scheduler(
            forecaster or NodeForecaster(costs),
            policy=settings.policy,
            parameters=settings.parameters,
            weights={name: tenant.weight for name, tenant in settings.tenants.items()},
        )
        quotas = Quotas(settings=settings, store=store, files=files, servers=servers, clock=clock.now_s)
        runner = JobRunner(
            settings=settings,
            store=store,
            scheduler=scheduler,
            servers=servers,
            book=book,
            files=files,
            clock=clock.now_s,
        )
        jobs = JobRoutes(
            settings=settings,
            store=store,
            scheduler=scheduler,
            runner=runner,
            book=book,
            files=files,
            quotas=quotas,
            trail=trail,
            clock=clock.now_s,
            seq=await store.last_seq(),
        )
        relay = runner.relay = Relay(
            status=jobs.status, current=runner.current, max_upload_bytes=settings.max_upload_bytes
        )
        app = web.Application(middlewares=[_answered, guard(keys)], client_max_size=settings.max_upload_bytes)

        async def hang_up(app: web.Application) -> None:
            """Before the server waits for its clients: websockets do not end by themselves."""
            await relay.close()

        app.on_shutdown.append(hang_up)
        routes = [
            *jobs.routes(),
            *FileRoutes(files=files, store=store, servers=servers, max_upload_bytes=settings.max_upload_bytes).routes(),
            *InfoRoutes(
                servers=servers, book=book, scheduler=scheduler, store=store, relay=relay, trail=trail
            ).routes(),
        ]

        async def events(request: web.Request) -> web.StreamResponse:
            require(request, "read")
            async with hung_up_on(request, keys):
                return await relay.serve(request, request[KEY].tenant)

        async def healthy(request: web.Request) -> web.Response:
            return web.json_response({"status": "ok", "servers_up": sum(map(servers.is_up, servers))})

        async def ready(request: web.Request) -> web.Response:
            """Whether a job would be accepted: some server is up and has told what it can run."""
            up = any(map(servers.is_up, servers))
            return web.json_response({"ready": up}, status=200 if up else 503)

        routes.append(web.get("/ws", events))
        app.router.add_get("/healthz", healthy)
        app.router.add_get("/readyz", ready)
        for route in routes:
            for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
                for prefix in ("", "/api"):
                    app.router.add_route(method, prefix + route.path, route.handler)
        for name in BLOCKED:
            for prefix in ("", "/api"):
                app.router.add_route("*", f"{prefix}/{name}{{rest:(/.*)?}}", _blocked)
        await runner.recover(await store.open_jobs())
        stack.push_async_callback(runner.close)
        for name, work in (
            ("servers", servers.run()),
            ("jobs", runner.run()),
            ("costs", kept.run(costs)),
            ("object info", known.run(book)),
            ("quotas", quotas.run()),
            ("audit", trail.run()),
        ):
            task = asyncio.create_task(work, name=f"comfyui {name}")
            stack.push_async_callback(_ended, task)
        yield app


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int) -> AsyncIterator[str]:
    """Serve the front; gives its URL. Raises OSError where the address is taken."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=5.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=2048)
        await site.start()
        found, actual = runner.addresses[0][:2]
        yield f"http://[{found}]:{actual}" if ":" in found else f"http://{found}:{actual}"
    finally:
        await runner.cleanup()


@web.middleware
async def _answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors in ComfyUI's shape."""
    try:
        return await handler(request)
    except web.HTTPException:
        raise
    except BadRequest as bad:
        return refusal(400, bad.problem)
    except SwarmXError as problem:
        status = next((status for kind, status in _STATUS.items() if isinstance(problem, kind)), 500)
        kind = {400: "invalid_query", 401: "unauthorized", 403: "forbidden"}.get(status, "unavailable")
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return refusal(status, error(kind, str(problem)), headers)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("unexpected error on %s %s", request.method, request.path)
        return refusal(500, error("internal", "an unexpected error, which is in the front's log"))


async def _blocked(request: web.Request) -> web.Response:
    return refusal(403, error("blocked", "this changes a server, or reads its files; ask the server itself"))


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

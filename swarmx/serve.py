"""`swarmx up`: one process with the gateway and its agents, from first token to clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop

from swarmx.config import Settings, is_loopback, load, parse
from swarmx.core.errors import ConfigError
from swarmx.runtime.garbage import leave_what_is_here
from swarmx.wiring import running

log = logging.getLogger(__name__)

_SMALL_FLEET = [
    {"model": "qwen3-8b", "device": "h100", "count": 1, "size_class": "8b"},
    {"model": "sdxl", "device": "l40s", "count": 1, "kind": "image"},
]
_SMALL_GROUPS = [
    {
        "model": "qwen3-8b",
        "device": "l40s",
        "size_class": "8b",
        "slots": 16,
        "min": 1,
        "max": 3,
        "limit": 6,
        "start_s": 20,
    }
]


def serve(
    *,
    config: Path | None,
    state_dir: Path,
    emulated: bool,
    port: int | None,
    on: str | None,
    coordinator: str | None,
    exit_with_parent: bool,
) -> None:
    """Run until SIGTERM or Ctrl-C. Raises ConfigError for settings that cannot work."""
    settings = load(config)
    changes: dict[str, object] = {}
    if config is None or "dir" not in settings.state.model_fields_set:
        changes["state"] = settings.state.model_copy(update={"dir": state_dir})
    if port is not None:
        changes["server"] = settings.server.model_copy(update={"port": port})
    if on is not None:
        changes["ray"] = settings.ray.model_copy(update={"address": on})
    if coordinator is not None:
        changes["coordinator"] = {**settings.coordinator.model_dump(), "engine": coordinator}
    if emulated:
        changes["emulated"], changes["elastic"] = _SMALL_FLEET, _SMALL_GROUPS
    settings = parse({**settings.model_dump(), **_plain(changes)}, source=str(config or "settings"))
    if not (settings.replicas or settings.emulated or settings.elastic or settings.tools):
        raise ConfigError(
            "there are no replicas: name some under [[replicas]] or [[elastic]] in a settings file, "
            "or try `swarmx up --emulated`."
        )
    uvloop.run(_serve(settings, exit_with_parent=exit_with_parent))


def _plain(changes: dict[str, object]) -> dict[str, object]:
    return {k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in changes.items()}


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn raises them again at its end, when replicas and store are still open."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Those who only wait for news are let go at once; calls may end."""
        self.config.app.state.context.changes.close()  # type: ignore[union-attr]  # it is our own application
        await super().shutdown(sockets)


async def _serve(settings: Settings, *, exit_with_parent: bool) -> None:
    listener = _listen(settings.server.host, settings.server.port)
    task, server = asyncio.current_task(), None

    def stop() -> None:
        if server is not None:
            server.force_exit = server.should_exit  # asked twice: do not wait for answers in progress
            server.should_exit = True
        elif task is not None:
            task.cancel()

    _on_end(stop, exit_with_parent=exit_with_parent)
    try:
        async with running(settings) as (app, context):
            context.keys.add_first()
            url = _url(listener)
            log.info("SwarmX listens on %s; tokens are in %s", url, settings.state.dir)
            if not is_loopback(settings.server.host):
                log.warning("%s can be reached from other machines; put TLS in front of it", settings.server.host)
            server = _Server(
                uvicorn.Config(
                    app,
                    http="httptools",
                    loop="none",
                    log_level="warning",
                    access_log=False,
                    lifespan="off",
                    # Longer than clients keep idle connections (aiohttp 15 s, browsers about a minute): one that is
                    # closed here while a request is on its way looks like a crash.
                    timeout_keep_alive=75,
                    timeout_graceful_shutdown=settings.server.drain_s,
                )
            )
            leave_what_is_here()
            print(f'{{"url": "{url}"}}', flush=True)
            await server.serve(sockets=[listener])
    except asyncio.CancelledError:
        log.info("stopped before it was up")


def _on_end(stop: Callable[[], None], *, exit_with_parent: bool) -> None:
    """Have `stop` called on SIGTERM, on Ctrl-C and, if wanted, when standard input ends."""
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    def read() -> None:
        if not os.read(stdin, 4096):
            loop.remove_reader(stdin)
            stop()

    if exit_with_parent:
        loop.add_reader(stdin, read)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another with --port, or 0 for a free one."
        ) from None
    return listener

"""One tool replica as a process: `python -m swarmx.providers.tools --help`."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import click
import msgspec
import uvicorn
import uvloop

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import ToolProvider
from swarmx.providers.child_server import ChildServer
from swarmx.providers.tools.http_tool import HttpProvider
from swarmx.providers.tools.jail import Jail
from swarmx.providers.tools.programs import ProgramProvider
from swarmx.providers.tools.server import ToolServer
from swarmx.providers.tools.settings import CommandTool, McpServer, PythonTool, ToolSettings, load
from swarmx.providers.tools.toolbox import Toolbox

TOKEN = "SWARMX_TOOLS_TOKEN"  # noqa: S105  # the name of the variable that holds it
GRACE_S = 2
AGAIN_S = 30.0  # until a provider that was refused is tried again


@click.command()
@click.option(
    "--config",
    "file",
    required=True,
    type=click.Path(path_type=Path),
    help="TOML file with the tools (docs/workflow_tools.md).",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Loopback port; 0 (default) picks one.")
@click.option("--exit-with-parent", is_flag=True, help="Exit when stdin ends.")
def main(file: Path, port: int, exit_with_parent: bool) -> None:
    """Serve the tools of a file on loopback and print {"port": N} once they can be called.

    Calls need the token that is in SWARMX_TOOLS_TOKEN.
    """
    token = os.environ.pop(TOKEN, "")
    if len(token) < 16:
        raise click.ClickException(f"{TOKEN} is not set, or shorter than 16 characters: it is what callers must show")
    try:
        settings = load(file)
        toolbox = Toolbox(providers(settings))
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    except (ConfigError, OSError) as error:
        raise click.ClickException(str(error)) from error
    uvloop.run(_serve(settings, toolbox, listener, token=token, exit_with_parent=exit_with_parent))


def providers(settings: ToolSettings) -> list[ToolProvider]:
    """Who provides the tools. Raises ConfigError when a package is missing."""
    made: list[ToolProvider] = []
    programs: tuple[CommandTool | PythonTool, ...] = (*settings.command, *settings.python)
    if programs:
        jail = Jail(slots=settings.slots, bwrap=settings.bwrap)
        made.append(ProgramProvider(programs, pool=settings.pool, jail=jail))
    if settings.http:
        made.append(HttpProvider(settings.http, pool=settings.pool))
    made += [_mcp(server, settings) for server in settings.mcp]
    return made


def _mcp(server: McpServer, settings: ToolSettings) -> ToolProvider:
    try:
        from swarmx.providers.tools.mcp_provider import McpProvider  # needs an extra, and half a second
    except ImportError:
        raise ConfigError(f"the MCP server {server.name} needs a package: pip install 'swarmx[mcp]'") from None
    # Programs that are retired end with their calls, and there is always the next one.
    jail = Jail(slots=settings.slots + 1, bwrap=settings.bwrap) if server.argv else None
    return McpProvider(server, pool=settings.pool, jail=jail)


async def _serve(
    settings: ToolSettings, toolbox: Toolbox, listener: socket.socket, *, token: str, exit_with_parent: bool
) -> None:
    await toolbox.open()
    for name, reason in toolbox.refused.items():
        click.echo(f"{name}: {reason}", err=True)
    tools = ToolServer(toolbox, pool=settings.pool, slots=settings.slots, waiting=settings.waiting, token=token)
    config = uvicorn.Config(
        tools.app,
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_S,
    )
    click.echo(msgspec.json.encode({"port": listener.getsockname()[1]}))
    opening = asyncio.create_task(_open_later(toolbox), name="opening tools that were refused")
    await _Server(config, tools, opening, exit_with_parent=exit_with_parent).serve(sockets=[listener])


async def _open_later(toolbox: Toolbox) -> None:
    """What is not there at the start may come: a server of somebody else, most of all."""
    while True:
        await asyncio.sleep(AGAIN_S)
        if toolbox.refused:
            await toolbox.open()


class _Server(ChildServer):
    """Ends the tools when it stops."""

    def __init__(
        self, config: uvicorn.Config, tools: ToolServer, opening: asyncio.Task[None], *, exit_with_parent: bool
    ) -> None:
        super().__init__(config, exit_with_parent=exit_with_parent)
        self._tools = tools
        self._opening = opening

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._opening.cancel()
        await asyncio.wait((self._opening,))
        await self._tools.close()


if __name__ == "__main__":
    main()

"""`swarmx comfy`: a front that speaks ComfyUI's API over several ComfyUI servers."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmx.core.errors import ConfigError
from swarmx.gateway.keys import Keyring

if TYPE_CHECKING:
    from swarmx.compat.comfyui.settings import FrontSettings

# The front and what it needs are imported late, because most commands need none of it.


@click.command("comfy")
@click.option("--config", type=click.Path(path_type=Path), help="Settings of the front, a TOML file.")
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="[NAME=]URL",
    help="A ComfyUI server, may be given again; in the place of those in the file.",
)
@click.option("--host", help="Address to listen on; 127.0.0.1 by default.")
@click.option("--port", type=int, help="Port to listen on; 8188 by default, 0 for a free one.")
@click.option("--allow", multiple=True, metavar="CLASS", help="Node class that clients may use, * is a wild card.")
@click.option("--policy", help="Routing policy; `swarmx policies` lists them.")
@click.option("--no-auth", is_flag=True, help="Clients need no key. For loopback addresses only.")
@click.pass_context
def comfy(
    ctx: click.Context,
    config: Path | None,
    servers: tuple[str, ...],
    host: str | None,
    port: int | None,
    allow: tuple[str, ...],
    policy: str | None,
    no_auth: bool,
) -> None:
    """Serve ComfyUI's API over several ComfyUI servers.

    Jobs are kept in the folder `comfyui` of the state folder and survive a restart. Keys are those of `swarmx keys`;
    the first one is made, and left in `admin.token`. Prints a line of JSON with the URL once it serves.
    """
    import uvloop

    from swarmx.compat.comfyui.settings import load

    settings = load(
        config,
        servers=[_server(text, number) for number, text in enumerate(servers)] or None,
        host=host,
        port=port,
        allow=allow or None,
        policy=policy,
        auth=False if no_auth else None,
    )
    uvloop.run(_serve(settings, ctx.obj["state_dir"]))


async def _serve(settings: FrontSettings, state_dir: Path) -> None:
    from swarmx.compat.comfyui.app import listening, running
    from swarmx.runtime.garbage import leave_what_is_here

    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = Keyring(state_dir / "keys.json") if settings.auth else None
    if keys is not None:
        keys.add_first()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with (
            running(settings, state_dir / "comfyui", keys=keys) as app,
            listening(app, settings.host, settings.port) as url,
        ):
            leave_what_is_here()
            print(json.dumps({"url": url}), flush=True)  # noqa: T201  # for whoever started it
            await stop.wait()
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}.") from None


def _server(text: str, number: int) -> dict[str, str]:
    name, mark, url = text.partition("=")
    return {"name": name, "url": url} if mark and "/" not in name else {"name": f"s{number + 1}", "url": text}


COMMANDS = (comfy,)

"""What all commands share: a connection to the server, output for people or programs, plain errors."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import click
from rich.console import Console

from swarmx.client import Api, token_for
from swarmx.core.errors import SwarmXError


class Group(click.Group):
    """Prints errors of the tree as one plain sentence and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SwarmXError as error:
            raise click.ClickException(str(error)) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            known = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"{error.message} There are: {known}.", ctx) from None


def ask(ctx: click.Context, work: Callable[[Api], Awaitable[Any]]) -> Any:
    """What the work returns, done with a connection to the server of this command line."""

    async def go() -> Any:
        async with Api(ctx.obj["url"], token_for(ctx.obj["state_dir"])) as api:
            return await work(api)

    return asyncio.run(go())


def show(ctx: click.Context, data: Any, render: Callable[[Console], None]) -> None:
    """The data as JSON with `--json`, else as it is rendered for people."""
    if ctx.obj["json"]:
        click.echo(json.dumps(data, indent=2))
    else:
        render(plain_console())


def plain_console() -> Console:
    """For text that clients named: it goes through as it is, without markup; a pipe gets room for whole ids."""
    return Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)

"""`swarmx workflow-tools`: the tools that workflows may use."""

from __future__ import annotations

import click
from rich.console import Console

from swarmx.tables import columns
from swarmx.terminal import ask, show


@click.command("workflow-tools")
@click.pass_context
def workflow_tools(ctx: click.Context) -> None:
    """List the tools that workflows may use, and why others are not there."""
    data = ask(ctx, lambda api: api.get("/api/v1/workflow_tools"))

    def render(console: Console) -> None:
        if not data["tools"]:
            console.print("There are no tools." if data["settled"] else "No pool has said what it has yet.")
        else:
            table = columns("tool", "pool", "time-out", "again?", "description")
            for tool in data["tools"]:
                again = "yes" if tool["idempotent"] else "no"
                table.add_row(tool["name"], tool["pool"], f"{tool['timeout_s']:g} s", again, tool["description"])
            console.print(table)
        for pool, reasons in data["refused"].items():
            for provider, reason in reasons.items():
                console.print(f"{pool}: {provider} is not there: {reason}", highlight=False)

    show(ctx, data, render)


COMMANDS = (workflow_tools,)

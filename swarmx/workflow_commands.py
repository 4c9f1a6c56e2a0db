"""The commands of workflows: submit, list, show, and whatever changes the course of one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console

from swarmx.client import Api, token_for
from swarmx.tables import columns, print_calls, print_program, print_remaining
from swarmx.terminal import Group, ask, plain_console, show

_AS_PAGE = {"accept": "application/json"}
_WORKFLOWS = "/api/v1/workflows"


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--input", "inputs", multiple=True, metavar="NAME=VALUE", help="An input of the workflow; JSON or text.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit with 1 unless it finished.")
@click.pass_context
def submit(ctx: click.Context, file: Any, inputs: tuple[str, ...], wait: bool) -> None:
    """Submit the workflow in FILE (YAML or JSON; - for standard input)."""
    try:
        source = file.read().decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{file.name} is not UTF-8 text: {error}.") from None
    values = dict(_input(text) for text in inputs)

    async def work(api: Api) -> Any:
        body = json.dumps({"workflow": source, "inputs": values}).encode()
        accepted = await api.post("/api/v1/workflows", data=body)
        while wait:
            row = await api.get(f"/api/v1/workflows/{accepted['workflow_id']}")
            if row["ended_at_s"] is not None:
                return row
            await asyncio.sleep(0.2)
        return accepted

    row = ask(ctx, work)
    show(ctx, row, lambda console: print_workflow(console, row))
    if wait and row["state"] != "finished":
        sys.exit(1)


def _input(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"--input {text!r}: write NAME=VALUE.")
    return name, _value(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@click.group(cls=Group, invoke_without_command=True)
@click.option(
    "--state",
    type=click.Choice(["running", "cancelling", "finished", "failed", "cancelled"]),
    help="Only workflows in this state.",
)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 200), help="How many on a page.")
@click.option("--cursor", help="Where the last page ended.")
@click.pass_context
def workflows(ctx: click.Context, state: str | None, limit: int, cursor: str | None) -> None:
    """List workflows, newest first; kill, retry, fork, signal or follow one."""
    if ctx.invoked_subcommand is not None:
        return
    page = ask(ctx, lambda api: api.get("/api/v1/workflows", state=state, limit=limit, cursor=cursor))

    def render(console: Console) -> None:
        table = columns("workflow", "kind", "name", "state", "seconds")
        for row in page["workflows"]:
            table.add_row(row["workflow_id"], row["kind"], row["name"], row["state"], _seconds(row))
        console.print(table)
        if page["next_cursor"]:
            console.print(f"More: swarmx workflows --cursor {page['next_cursor']}")

    show(ctx, page, render)


@workflows.command()
@click.argument("workflow_id")
@click.pass_context
def kill(ctx: click.Context, workflow_id: str) -> None:
    """End a workflow at once, whatever its calls do."""
    row = ask(ctx, lambda api: api.post(f"{_path(workflow_id)}/kill"))
    show(ctx, row, lambda console: print_workflow(console, row))


@workflows.command()
@click.argument("workflow_id")
@click.pass_context
def retry(ctx: click.Context, workflow_id: str) -> None:
    """Begin a new workflow that does a failed one's failed node anew, and what follows."""
    row = ask(ctx, lambda api: api.post(f"{_path(workflow_id)}/retry"))
    show(ctx, row, lambda console: print_workflow(console, row))


@workflows.command()
@click.argument("workflow_id")
@click.argument("node")
@click.option("--input", "inputs", multiple=True, metavar="NAME=VALUE", help="An input that replaces the old one.")
@click.pass_context
def fork(ctx: click.Context, workflow_id: str, node: str, inputs: tuple[str, ...]) -> None:
    """Begin a new workflow that shares the beginning of another, up to NODE."""
    body: dict[str, Any] = {"from_node": node}
    if inputs:
        body["inputs"] = dict(_input(text) for text in inputs)
    row = ask(ctx, lambda api: api.post(f"{_path(workflow_id)}/fork", json=body))
    show(ctx, row, lambda console: print_workflow(console, row))


@workflows.command()
@click.argument("workflow_id")
@click.argument("name")
@click.argument("value", default="null")
@click.pass_context
def signal(ctx: click.Context, workflow_id: str, name: str, value: str) -> None:
    """Send a workflow the signal NAME with a VALUE, JSON or text."""
    body = json.dumps(_value(value)).encode()
    row = ask(ctx, lambda api: api.post(f"{_path(workflow_id)}/signals/{quote(name, safe='')}", data=body))
    show(ctx, row, lambda console: console.print(f"{row['workflow_id']} has the signal {row['signal']}."))


@workflows.command()
@click.argument("workflow_id")
@click.option("--after", default=0, show_default=True, type=click.IntRange(0), help="Only events behind this one.")
@click.option("--follow", is_flag=True, help="Go on until the workflow has ended.")
@click.pass_context
def events(ctx: click.Context, workflow_id: str, after: int, follow: bool) -> None:
    """Print what happened to a workflow, one event a line; with --json as JSON lines."""
    console = plain_console()

    def told(event: dict[str, Any]) -> None:
        if ctx.obj["json"]:
            click.echo(json.dumps(event))
            return
        rest = {name: value for name, value in event.items() if name not in ("seq", "at_s", "type")}
        words = " ".join(f"{name}={json.dumps(value, ensure_ascii=False):.200}" for name, value in rest.items())
        console.print(f"{event['seq']:>5} {event['type']} {words}".rstrip(), highlight=False, soft_wrap=True)

    if follow:
        asyncio.run(_follow(ctx, workflow_id, after, told))
        return

    async def pages(api: Api) -> None:
        place, more = after, True
        while more:
            page = await api.get(f"{_path(workflow_id)}/events", headers=_AS_PAGE, after=place, limit=1000)
            for event in page["events"]:
                told(event)
            place, more = page["next_after"], page["has_more"]

    ask(ctx, pages)


async def _follow(ctx: click.Context, workflow_id: str, after: int, told: Callable[[dict[str, Any]], None]) -> None:
    """Also across restarts of the server."""
    from swarmx.sdk.client import AsyncClient

    async with AsyncClient(ctx.obj["url"], token_for(ctx.obj["state_dir"])) as client:
        async for event in client.events(workflow_id, after=after):
            told({"seq": event.seq, "at_s": event.at_s, "type": event.type, **event.data})


@click.command("show")
@click.argument("workflow_id")
@click.pass_context
def show_workflow(ctx: click.Context, workflow_id: str) -> None:
    """Show one workflow: its nodes, calls and outputs."""
    row = ask(ctx, lambda api: api.get(_path(workflow_id)))
    show(ctx, row, lambda console: print_workflow(console, row))


@click.command()
@click.argument("workflow_id")
@click.pass_context
def cancel(ctx: click.Context, workflow_id: str) -> None:
    """Cancel a workflow, down to the engines that work on it."""
    row = ask(ctx, lambda api: api.post(f"{_path(workflow_id)}/cancel", headers={"prefer": "wait=30"}))
    show(ctx, row, lambda console: print_workflow(console, row))


COMMANDS = (submit, workflows, show_workflow, cancel)


def _path(workflow_id: str) -> str:
    return f"{_WORKFLOWS}/{quote(workflow_id, safe='~:')}"


def _seconds(row: dict[str, Any]) -> str:
    return "" if row.get("ended_at_s") is None else f"{row['ended_at_s'] - row['created_at_s']:.1f}"


def spent_words(spent: dict[str, Any], budget: dict[str, Any] | None) -> str:
    """What a workflow has used up, and what it may."""
    used = spent | {"tokens": spent["prompt_tokens"] + spent["output_tokens"]}
    words = []
    for what, unit in (("tokens", "tokens"), ("steps", "steps"), ("money", "money"), ("replica_s", "s of replicas")):
        allowed = (budget or {}).get(what)
        words.append(f"{round(used[what], 4):,.10g}{'' if allowed is None else f' of {allowed:,.10g}'} {unit}")
    return f"Used up: {', '.join(words)}"


def print_workflow(console: Console, row: dict[str, Any]) -> None:
    took = "" if not _seconds(row) else f" {_seconds(row)} s"
    console.print(f"{row['workflow_id']}: {row['state']}{took}", highlight=False)
    if row.get("nodes"):
        table = columns("node", "kind", "state", "seconds")
        for node in row["nodes"]:
            begun, ended = node.get("started_at_s"), node.get("ended_at_s")
            seconds = f"{ended - begun:.2f}" if begun is not None and ended is not None else ""
            waits = f" (awaits {', '.join(node['awaits'])})" if node.get("awaits") else ""
            table.add_row(node["path"], node["kind"], node["state"] + waits, seconds)
        console.print(table)
    for signal in row.get("signals", []):
        console.print(f"Signal {signal['name']}: {signal['state']}", highlight=False)
    if row.get("spent"):
        console.print(spent_words(row["spent"], row.get("budget")), highlight=False)
    if row.get("calls"):
        print_calls(console, row["calls"])
    if row.get("program"):
        print_program(console, row["program"])
    if row.get("remaining"):
        print_remaining(console, row["remaining"])
    if row.get("error"):
        console.print(f"Failed at {row.get('error_node') or 'the workflow'}: {row['error']}", highlight=False)
    if row.get("outputs") is not None:
        console.print_json(data=row["outputs"])

"""The operators' commands: ask, decide on proposals, change things by hand, and read or check the audit log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, BinaryIO, TypeVar, get_args

import click
import msgspec
from rich.console import Console

from swarmx.client import Api
from swarmx.core.audit import Head
from swarmx.core.control import Change, Evidence, ProposalState, ToolCall
from swarmx.core.errors import ConfigError
from swarmx.tables import columns
from swarmx.terminal import Group, ask, plain_console, show

F = TypeVar("F", bound=Callable[..., Any])

_HEX_DIGITS = 64


@click.command("ask")
@click.argument("text", nargs=-1, required=True)
@click.pass_context
def ask_command(ctx: click.Context, text: tuple[str, ...]) -> None:
    """Ask a question, or give an order that becomes a proposal, in plain English."""
    path, sentence = "/api/v1/console", {"text": " ".join(text)}
    console = plain_console()

    async def printed(api: Api) -> bool:
        failed = False
        async for name, data in api.stream(path, json=sentence):
            _print_event(console, name, data)
            failed |= name == "error"
        return failed

    if ctx.obj["json"]:
        answer = ask(ctx, lambda api: api.whole(path, json=sentence))
        show(ctx, answer, lambda _: None)
        failed = answer["error"] is not None
    else:
        failed = ask(ctx, printed)
    if failed:
        sys.exit(1)


@click.group(cls=Group, invoke_without_command=True)
@click.option("--state", type=click.Choice(get_args(ProposalState)), help="Only proposals in this state.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 200), help="How many, newest first.")
@click.pass_context
def proposals(ctx: click.Context, state: str | None, limit: int) -> None:
    """List what was proposed; approve or deny it."""
    if ctx.invoked_subcommand is not None:
        return
    data = ask(ctx, lambda api: api.get("/api/v1/proposals", state=state, limit=limit))

    def render(console: Console) -> None:
        if not data["proposals"]:
            console.print("There is no proposal." if state is None else f"No proposal is {state}.")
        for proposal in data["proposals"]:
            _print_proposal(console, proposal)

    show(ctx, data, render)


@proposals.command()
@click.argument("proposal_id")
@click.pass_context
def approve(ctx: click.Context, proposal_id: str) -> None:
    """Approve a proposal: it is applied at once."""
    data = ask(ctx, lambda api: api.post(f"/api/v1/proposals/{proposal_id}/approve"))
    show(ctx, data, lambda console: _print_proposal(console, data))


@proposals.command()
@click.argument("proposal_id")
@click.option("--reason", default="", help="Why, for the audit log and for who proposed it.")
@click.pass_context
def deny(ctx: click.Context, proposal_id: str, reason: str) -> None:
    """Deny a proposal."""
    data = ask(ctx, lambda api: api.post(f"/api/v1/proposals/{proposal_id}/deny", json={"reason": reason}))
    show(ctx, data, lambda console: _print_proposal(console, data))


@click.group(cls=Group)
def audit() -> None:
    """The audit log: every control action, in a chain of hashes."""


@audit.command("list")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000), help="How many of the last.")
@click.option("--before", type=click.IntRange(1), help="Only records with smaller numbers.")
@click.pass_context
def audit_list(ctx: click.Context, limit: int, before: int | None) -> None:
    """List the last records, oldest first."""
    data = ask(ctx, lambda api: api.get("/api/v1/audit", limit=limit, before=before))

    def render(console: Console) -> None:
        table = columns("record", "time", "who", "by", "what", "changes", "outcome")
        for record in data["records"]:
            entry = record["entry"]
            changes = "\n".join(_change(change) for change in entry["changes"])
            verdict = entry["verdict"] or {"allowed": True}
            refused = "" if verdict["allowed"] else f"({verdict['rule']})"
            outcome = " ".join(filter(None, [entry["outcome"], refused, entry["detail"]]))
            what = f"{entry['kind']} {entry['tool']}"
            table.add_row(
                str(record["seq"]), _time(record["at_s"]), entry["actor"]["name"], entry["via"], what, changes, outcome
            )
        console.print(table)

    show(ctx, data, render)


@audit.command()
@click.option("--head", "heads", multiple=True, metavar="SEQ:HASH", help="A head that you kept elsewhere.")
@click.pass_context
def verify(ctx: click.Context, heads: tuple[str, ...]) -> None:
    """Check the files in the state folder, without a server; exit with 1 when they are not as they were written."""
    from swarmx.llm_coordinator.answers import report_words
    from swarmx.memory.audit import verify_files

    known = [_head(text) for text in heads]
    _existing_log(ctx)
    report = verify_files(ctx.obj["state_dir"], known)

    def render(console: Console) -> None:
        for line in report_words(report):
            console.print(line, highlight=False, soft_wrap=True)

    show(ctx, {"sound": report.sound, "report": msgspec.to_builtins(report)}, render)
    if not report.sound:
        sys.exit(1)


@audit.command()
@click.option("--out", type=click.File("wb"), default="-", help="Write to this file instead of standard output.")
@click.pass_context
def export(ctx: click.Context, out: BinaryIO) -> None:
    """Write all records in the state folder as they are there, one JSON object a line; without a server."""
    from swarmx.memory.audit import export_log

    for line in export_log(_existing_log(ctx)):
        out.write(line)


def _changing(command: F) -> F:
    """The options of every command that changes something."""
    command = click.option("--dry-run", is_flag=True, help="Only say what would change, and whether it is allowed.")(
        command
    )
    return click.option("--reason", default="", help="Why, for the audit log.")(command)


@click.command()
@click.argument("replica")
@click.option("--force", is_flag=True, help="Even if it is the last ready replica of its model.")
@_changing
@click.pass_context
def drain(ctx: click.Context, replica: str, force: bool, reason: str, dry_run: bool) -> None:
    """Let a replica finish its calls, then stop it (one that SwarmX did not start is cordoned)."""
    _order(ctx, "drain_replica", {"replica_id": replica, "force": force}, reason, dry_run)


@click.command()
@click.argument("replica")
@click.option("--force", is_flag=True, help="Even if it is the last ready replica of its model.")
@_changing
@click.pass_context
def cordon(ctx: click.Context, replica: str, force: bool, reason: str, dry_run: bool) -> None:
    """Send a replica no more calls; it keeps those it has."""
    _order(ctx, "cordon_replica", {"replica_id": replica, "cordoned": True, "force": force}, reason, dry_run)


@click.command()
@click.argument("replica")
@_changing
@click.pass_context
def uncordon(ctx: click.Context, replica: str, reason: str, dry_run: bool) -> None:
    """Put a replica back into rotation."""
    _order(ctx, "cordon_replica", {"replica_id": replica, "cordoned": False}, reason, dry_run)


@click.command()
@click.argument("model")
@click.argument("replicas", type=click.IntRange(0))
@_changing
@click.pass_context
def scale(ctx: click.Context, model: str, replicas: int, reason: str, dry_run: bool) -> None:
    """Have MODEL run on this many REPLICAS for a while, whatever the scaling policy says."""
    _order(ctx, "scale_model", {"model": model, "replicas": replicas}, reason, dry_run)


@click.command()
@click.argument("model")
@click.argument("low", metavar="MIN", type=click.IntRange(0))
@click.argument("high", metavar="MAX", type=click.IntRange(0))
@_changing
@click.pass_context
def bounds(ctx: click.Context, model: str, low: int, high: int, reason: str, dry_run: bool) -> None:
    """Keep MODEL between MIN and MAX replicas."""
    arguments = {"model": model, "min_replicas": low, "max_replicas": high}
    _order(ctx, "set_replica_bounds", arguments, reason, dry_run)


@click.command()
@click.argument("proposal_id")
@_changing
@click.pass_context
def rollback(ctx: click.Context, proposal_id: str, reason: str, dry_run: bool) -> None:
    """Take back a change that is in force."""
    _order(ctx, "rollback", {"proposal_id": proposal_id}, reason, dry_run)


COMMANDS = (ask_command, proposals, audit, drain, cordon, uncordon, scale, bounds, rollback)


def _order(ctx: click.Context, tool: str, arguments: dict[str, Any], reason: str, dry_run: bool) -> None:
    body = {"arguments": arguments, "reason": reason, "dry_run": dry_run}
    data = ask(ctx, lambda api: api.post(f"/api/v1/tools/{tool}", json=body))

    def render(console: Console) -> None:
        if not dry_run:
            _print_proposal(console, data)
            return
        for change in data["diff"]["changes"]:
            console.print(_change(change), highlight=False)
        verdict = data["verdict"]
        console.print("It is allowed." if verdict["allowed"] else f"Refused ({verdict['rule']}): {verdict['detail']}")

    show(ctx, data, render)
    if dry_run and not data["verdict"]["allowed"]:
        sys.exit(1)


def _head(text: str) -> Head:
    seq, _, digest = text.partition(":")
    if not seq.isdecimal() or len(digest) != _HEX_DIGITS or set(digest) - set("0123456789abcdef"):
        raise click.BadParameter(f"--head {text!r}: write SEQ:HASH, a number and {_HEX_DIGITS} hex digits.")
    return Head(seq=int(seq), hash=digest, at_s=0.0)


def _existing_log(ctx: click.Context) -> Any:
    """The path of the log. Raises ConfigError where there is neither a log nor a trace of one."""
    from swarmx.memory.audit import LOG_NAME
    from swarmx.memory.audit_heads import HEADS_SUFFIX

    path = ctx.obj["state_dir"] / LOG_NAME
    if not path.exists() and not path.with_suffix(HEADS_SUFFIX).exists():
        raise ConfigError(f"there is no audit log in {path.parent}; name the server's folder with --state-dir.")
    return path


def _print_event(console: Console, name: str, data: dict[str, Any]) -> None:
    match name:
        case "text":
            console.print(data["text"], highlight=False, soft_wrap=True)
        case "evidence":
            console.print(f"  {_evidence(data['evidence'])}", style="dim", highlight=False)
        case "proposal":
            _print_proposal(console, data["proposal"])
        case "error":
            rule = f" ({data['rule']})" if data["rule"] else ""
            console.print(f"Error{rule}: {data['detail']}", highlight=False, soft_wrap=True)


def _print_proposal(console: Console, proposal: dict[str, Any]) -> None:
    head = f"{proposal['proposal_id']} {proposal['state']}: {_call(proposal['call'])}"
    console.print(head, highlight=False, soft_wrap=True)
    for change in proposal["diff"]["changes"]:
        console.print(f"  {_change(change)}", highlight=False, soft_wrap=True)
    for item in proposal["diff"]["predicted"]:
        console.print(f"  expected: {_evidence(item)}", highlight=False)
    who = proposal["actor"]["name"]
    told = [f"by {who}, {_time(proposal['at_s'])}"]
    told += [f"“{proposal['reason']}”"] if proposal["reason"] else []
    told += [proposal["detail"]] if proposal["detail"] else []
    console.print(f"  {'; '.join(told)}", style="dim", highlight=False, soft_wrap=True)


# The words are those of the console; they are imported late, because most commands need none of them.


def _call(call: dict[str, Any]) -> str:
    from swarmx.llm_coordinator.answers import call_words

    return call_words(msgspec.convert(call, ToolCall))


def _change(change: dict[str, Any]) -> str:
    from swarmx.llm_coordinator.answers import change_words

    return change_words(msgspec.convert(change, Change))


def _evidence(item: dict[str, Any]) -> str:
    from swarmx.llm_coordinator.answers import evidence_words

    return evidence_words(msgspec.convert(item, Evidence))


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00") + "Z"

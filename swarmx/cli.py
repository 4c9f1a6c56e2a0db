"""The command line `swarmx`: starts a server, and asks one about workflows, calls, replicas, policies and keys."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from swarmx import comfy_commands, commands, predictor_commands, tool_commands, workflow_commands
from swarmx.client import Api
from swarmx.core.errors import SwarmXError
from swarmx.tables import print_decision, print_replicas
from swarmx.terminal import Group, ask, show

DEFAULT_URL = "http://127.0.0.1:8100"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="swarmx")
@click.option("--url", envvar="SWARMX_URL", default=DEFAULT_URL, show_default=True, help="The server to talk to.")
@click.option(
    "--state-dir",
    envvar="SWARMX_STATE_DIR",
    type=click.Path(path_type=Path),
    default=Path(".swarmx"),
    show_default=True,
    help="Folder in which `swarmx up` keeps its database, keys and journals.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of tables for people.")
@click.pass_context
def main(ctx: click.Context, url: str, state_dir: Path, as_json: bool) -> None:
    """SwarmX: scheduler agents for agentic workflows.

    Commands talk to a running server (`swarmx up`), but for up, comfy, demo, replay, config, keys, predictor and train.
    """
    ctx.obj = {"url": url, "state_dir": state_dir, "json": as_json}


@main.command()
@click.option("--config", type=click.Path(path_type=Path), envvar="SWARMX_CONFIG", help="Settings, a TOML file.")
@click.option("--emulated", is_flag=True, help="Serve a small emulated fleet, to try things without a GPU.")
@click.option("--port", type=int, help="Overrides server.port.")
@click.option(
    "--on", metavar="ADDRESS", help="Run elastic replicas on a Ray cluster: ray://auto, ray://HOST:PORT, HOST:PORT."
)
@click.option(
    "--coordinator",
    type=click.Choice(["off", "rules", "openai", "vllm"]),
    help="Who thinks for the coordinator; overrides coordinator.engine.",
)
@click.option("--exit-with-parent", is_flag=True, hidden=True)
@click.pass_context
def up(
    ctx: click.Context,
    config: Path | None,
    emulated: bool,
    port: int | None,
    on: str | None,
    coordinator: str | None,
    exit_with_parent: bool,
) -> None:
    """Start the gateway and its agents in the foreground."""
    from swarmx.serve import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    serve(
        config=config,
        state_dir=ctx.obj["state_dir"],
        emulated=emulated,
        port=port,
        on=on,
        coordinator=coordinator,
        exit_with_parent=exit_with_parent,
    )


@main.command()
@click.option(
    "--workflows", type=click.IntRange(3, 600), help="How many workflows (default: 120, or 3 with --engine vllm)."
)
@click.option(
    "--time-scale", type=float, help="How much faster than real the fleet is emulated (6; 1 with --coordinator vllm)."
)
@click.option("--seed", default=0, show_default=True, help="Seed of arrivals, of the choice of tasks and of answers.")
@click.option(
    "--engine", type=click.Choice(["emulated", "vllm"]), default="emulated", show_default=True, help="Who answers."
)
@click.option(
    "--coordinator",
    type=click.Choice(["rules", "vllm"]),
    default="rules",
    show_default=True,
    help="Who thinks for the coordinator in the flash crowd: the rules, or a real vLLM here (make setup-vllm).",
)
@click.option(
    "--part",
    type=click.Choice(["all", "routing", "crowd"]),
    help="Only one part; by default both, or what a real vLLM is asked for.",
)
@click.option("--model", type=click.Path(path_type=Path), help="Folder of the model for vLLM.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Keep databases, journals and result.json in this folder."
)
@click.pass_context
def demo(
    ctx: click.Context,
    workflows: int | None,
    time_scale: float | None,
    seed: int,
    engine: str,
    coordinator: str,
    part: str | None,
    model: Path | None,
    keep: Path | None,
) -> None:
    """Run the main job: many agentic workflows over a mixed fleet, with round robin beside it; then a flash crowd."""
    from swarmx.demo.run import run_demo

    result = asyncio.run(
        _ended_by_sigterm(
            run_demo(
                workflows=workflows,
                time_scale=time_scale or (1.0 if coordinator == "vllm" else 6.0),
                seed=seed,
                engine=engine,
                coordinator=coordinator,
                part=part or ("routing" if engine == "vllm" else "crowd" if coordinator == "vllm" else "all"),
                model=model,
                keep=keep,
                console=Console(stderr=ctx.obj["json"]),
            )
        )
    )
    if ctx.obj["json"]:
        click.echo(json.dumps(result, indent=2))


async def _ended_by_sigterm(work: Coroutine[Any, Any, Any]) -> Any:
    """Like Ctrl-C, SIGTERM unwinds the work, so that the servers it started are stopped."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise SwarmXError("stopped by a signal") from None


@main.command()
@click.argument("call_id")
@click.option("--policy", metavar="POLICY", help="Also tell what this policy would have done with what was seen then.")
@click.pass_context
def why(ctx: click.Context, call_id: str, policy: str | None) -> None:
    """Explain why a call went where it went."""
    row = ask(ctx, lambda api: api.get(f"/api/v1/calls/{call_id}/why", policy=policy))

    def render(console: Console) -> None:
        for item in row["decisions"]:
            print_decision(console, item)

    show(ctx, row, render)


@main.command()
@click.pass_context
def replicas(ctx: click.Context) -> None:
    """List the replicas, their state and load."""
    data = ask(ctx, lambda api: api.get("/api/v1/replicas"))
    show(ctx, data, lambda console: print_replicas(console, data["replicas"]))


@main.command()
@click.option("--set", "name", metavar="POLICY", help="Route by this policy from now on.")
@click.option("--param", multiple=True, metavar="NAME=NUMBER", help="A parameter of that policy.")
@click.pass_context
def policies(ctx: click.Context, name: str | None, param: tuple[str, ...]) -> None:
    """List the routing policies, or set the one in force."""
    if param and name is None:
        raise click.UsageError("--param needs --set: parameters belong to a policy.")
    parameters = {}
    for text in param:
        key, _, value = text.partition("=")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise click.BadParameter(f"--param {text!r}: write NAME=NUMBER.") from None

    async def work(api: Api) -> Any:
        if name is not None:
            await api.put("/api/v1/policies/routing", json={"policy": name, "parameters": parameters})
        return await api.get("/api/v1/policies")

    data = ask(ctx, work)

    def render(console: Console) -> None:
        table = Table("", "policy", "parameters", "what it does")
        for row in data["policies"]:
            mark = "●" if row["name"] == data["active"]["policy"] else ""
            values = {**row["parameters"], **(data["active"]["parameters"] if mark else {})}
            table.add_row(mark, row["name"], ", ".join(f"{k}={v:g}" for k, v in values.items()), row["description"])
        console.print(table)

    show(ctx, data, render)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--agent", multiple=True, metavar="NAME=MODULE:FACTORY", help="How to build an agent of your own.")
@click.pass_context
def replay(ctx: click.Context, file: Path, agent: tuple[str, ...]) -> None:
    """Feed a journal to fresh agents and check that they decide the same; exit with 1 if not."""
    import msgspec

    from swarmx.runtime.journal import AGENT_FACTORIES, load_factory
    from swarmx.runtime.journal import replay as replay_journal

    own = dict(load_factory(text) for text in agent)
    result = replay_journal(file, {**AGENT_FACTORIES, **own})
    data = msgspec.to_builtins(result)

    def render(console: Console) -> None:
        if result.divergence is None:
            console.print(f"{result.steps} steps, {result.decisions} dispatches: all reproduced.")
            return
        console.print(
            f"Step {result.divergence.step} diverges, on {type(result.divergence.entry.heard.message).__name__}."
        )
        console.print("Journal:", data["divergence"]["entry"]["answered"])
        console.print("Replay: ", data["divergence"]["replayed"])

    show(ctx, data, render)
    if result.divergence is not None:
        sys.exit(1)


@main.command()
@click.option("--config", type=click.Path(path_type=Path), envvar="SWARMX_CONFIG", help="Settings, a TOML file.")
@click.pass_context
def config(ctx: click.Context, config: Path | None) -> None:
    """Check a settings file and print all settings with their values and meaning."""
    from swarmx.config import load, rows

    settings = load(config)
    data = settings.model_dump(mode="json")

    def render(console: Console) -> None:
        table = Table("setting", "value", "meaning")
        for name, value, help_text in rows(settings):
            table.add_row(name, value, help_text)
        console.print(table)

    show(ctx, data, render)


@main.group(cls=Group)
def keys() -> None:
    """Tokens: who may do what."""


@keys.command("add")
@click.argument("name")
@click.option(
    "--role", type=click.Choice(["client", "viewer", "operator", "admin"]), required=True, help="What it may do."
)
@click.option("--tenant", default="default", show_default=True, help="Whose workflows and calls it makes and sees.")
@click.pass_context
def keys_add(ctx: click.Context, name: str, role: Any, tenant: str) -> None:
    """Make a token; it is shown once and kept only as a hash."""
    from swarmx.gateway.keys import Keyring

    token = Keyring(ctx.obj["state_dir"] / "keys.json").add(name, role, tenant)
    data = {"name": name, "role": role, "tenant": tenant, "token": token}
    show(ctx, data, lambda console: console.print(token, soft_wrap=True, highlight=False))


@keys.command("list")
@click.pass_context
def keys_list(ctx: click.Context) -> None:
    """List the keys, without their tokens."""
    from swarmx.gateway.keys import Keyring

    data = [{"name": k.name, "role": k.role, "tenant": k.tenant} for k in Keyring(_keys_path(ctx)).all()]

    def render(console: Console) -> None:
        table = Table("name", "role", "tenant")
        for row in data:
            table.add_row(row["name"], row["role"], row["tenant"])
        console.print(table)

    show(ctx, data, render)


@keys.command("revoke")
@click.argument("name")
@click.pass_context
def keys_revoke(ctx: click.Context, name: str) -> None:
    """Forget a key; a running server refuses its token from then on."""
    from swarmx.gateway.keys import Keyring

    Keyring(_keys_path(ctx)).revoke(name)
    show(ctx, {"revoked": name}, lambda console: console.print(f"revoked {name}"))


def _keys_path(ctx: click.Context) -> Path:
    path: Path = ctx.obj["state_dir"] / "keys.json"
    return path


for command in (
    *workflow_commands.COMMANDS,
    *comfy_commands.COMMANDS,
    *commands.COMMANDS,
    *predictor_commands.COMMANDS,
    *tool_commands.COMMANDS,
):
    main.add_command(command)

if __name__ == "__main__":
    main()

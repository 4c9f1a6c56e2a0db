"""One emulated replica as a process: `python -m swarmx.providers.emulated --help`."""

from __future__ import annotations

import select
import socket
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import click
import msgspec
import uvicorn

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import CallKind, EngineOrder
from swarmx.providers.child_server import ChildServer
from swarmx.providers.emulated.app import replica_app
from swarmx.providers.emulated.truth import Truth, length_factors, recorded

GRACE_S = 2


@click.command()
@click.option("--model", required=True, help="Name of the model on the wire.")
@click.option("--device", required=True, help="Name of the device that is emulated.")
@click.option("--kind", type=click.Choice(["llm", "image"]), default="llm", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Loopback port; 0 (default) picks one.")
@click.option("--time-scale", type=click.FloatRange(0.0, min_open=True), default=1.0, help="Times faster than real.")
@click.option("--seed", type=int, default=0, help="Another seed is another run of the same model.")
@click.option("--profile-json", required=True, help="EngineProfile fields as JSON, in real seconds.")
@click.option("--size-class", default="small", show_default=True, help="Stretches recorded answer lengths.")
@click.option(
    "--engine-order",
    type=click.Choice(get_args(EngineOrder)),
    default="arrival",
    show_default=True,
    help="Whom the engine admits first, as vLLM does with --scheduling-policy fcfs or priority.",
)
@click.option("--recorded", "folder", type=click.Path(path_type=Path), help="Folder of recorded answers (*.jsonl).")
@click.option("--exit-with-parent", is_flag=True, help="Exit when stdin ends.")
@click.option(
    "--start-s", type=click.FloatRange(0.0), default=0.0, help="Real seconds that stand for loading the weights."
)
@click.option("--fault", type=click.Choice(["exit", "hang"]), hidden=True, help="Never come up: die, or load for ever.")
def main(
    model: str,
    device: str,
    kind: CallKind,
    port: int,
    time_scale: float,
    seed: int,
    profile_json: str,
    size_class: str,
    engine_order: EngineOrder,
    folder: Path | None,
    exit_with_parent: bool,
    start_s: float,
    fault: Literal["exit", "hang"] | None,
) -> None:
    """Serve one emulated replica on loopback and print {"port": N} once it can be reached."""
    if not _load(None if fault == "hang" else start_s / time_scale, exit_with_parent=exit_with_parent):
        return
    if fault == "exit":
        raise click.ClickException(f"{model} on {device}: told to fail at its start")
    try:
        fields: dict[str, Any] = {"model": model, "device": device, **msgspec.json.decode(profile_json, type=dict)}
        profile = msgspec.convert(fields, EngineProfile).scaled(time_scale)
        app = replica_app(
            model,
            kind,
            profile,
            truth=lambda: Truth(
                rows=recorded(folder), model=model, size_class=size_class, factors=length_factors(), seed=seed
            ),
            seed=seed,
            engine_order=engine_order,
        )
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    except (msgspec.DecodeError, ConfigError, OSError) as error:
        raise click.ClickException(f"{model} on {device}: {error}") from error
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_S,
    )
    click.echo(msgspec.json.encode({"port": listener.getsockname()[1]}))
    ChildServer(config, exit_with_parent=exit_with_parent).run(sockets=[listener])


def _load(seconds: float | None, *, exit_with_parent: bool) -> bool:
    """Let the time pass that loading weights would take, for ever if None; false when the parent is gone."""
    ended, _, _ = select.select([sys.stdin] if exit_with_parent else [], [], [], seconds)
    return not ended


if __name__ == "__main__":
    main()

"""The commands of the predictors: explain a forecast, report on all of them, and train heads, also from memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from swarmx.core.errors import ConfigError, NotFound, PredictorError
from swarmx.core.records import CallRecord
from swarmx.finished_calls import finished_calls
from swarmx.predictor_tables import print_explanation, print_report, print_retrained, print_trained
from swarmx.terminal import Group, show

if TYPE_CHECKING:
    from swarmx.neural.explain import Explanation

# Numpy and what needs it is imported late, because most commands need none of it.

HEADS = ("length", "latency", "structure", "image")
SLOW = ("sentence", "isomorphic")
UNSTATED = "not stated"
_LEARNT = 5000  # finished calls, as many as retraining reads
_MOST_BYTES = 64 << 20
_EXTRA = 'install "swarmx[train]"'
_WEIGHTS = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Folder that `swarmx train` wrote; by default the weights that ship.",
)
_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="SWARMX_CONFIG",
    help="The server's settings, if its calls are in a database that these name.",
)


@click.group(cls=Group)
def predictor() -> None:
    """Look into the predictors: why a forecast is what it is, and how good forecasts are."""


@predictor.command("explain")
@click.argument("source", required=False, type=click.File("rb"))
@click.option("--text", help="The prompt itself.")
@click.option("--file", "file", type=click.File("rb"), help="A file with the prompt; - for standard input.")
@click.option("--model", help="The model that is asked; required, but with --call.")
@click.option("--role", default="", help="What the call is for, as KIND/ROLE: the workflow's kind and the role.")
@click.option("--limit", type=click.FloatRange(1.0), help="The most output tokens that the client allows.")
@click.option("--call", "call_id", metavar="CALL_ID", help="Explain this finished call from its encoding instead.")
@click.option("--no-memory", is_flag=True, help="Leave out what the state folder remembers.")
@_WEIGHTS
@_CONFIG
@click.pass_context
def explain_command(
    ctx: click.Context,
    source: Any,
    text: str | None,
    file: Any,
    model: str | None,
    role: str,
    limit: float | None,
    call_id: str | None,
    no_memory: bool,
    weights: Path | None,
    config: Path | None,
) -> None:
    """Explain a length forecast: the words and the knowledge that moved it, and the nearest remembered prompts.

    The prompt is --text, --file, or SOURCE (- for standard input). Calls in the database of --state-dir, or of
    --config, are learnt from first, as a server learns from them. A stored call is explained from its encoding: its
    text was never kept, so that words cannot be told.
    """
    from swarmx.core.forecast import LEVELS
    from swarmx.core.prompts import cut
    from swarmx.neural.explain import explain_prompt, explain_vector, nearest
    from swarmx.neural.forecaster import NeuralForecaster, role_of
    from swarmx.neural.leader import FollowTheLeader
    from swarmx.neural.replayed import replay, vector_of
    from swarmx.neural.tracking import QuantileTracker

    given = [value for value in (source, text, file, call_id) if value is not None]
    if len(given) != 1:
        raise click.UsageError("give one prompt: --text TEXT, --file FILE, - for standard input, or --call CALL_ID.")
    if call_id is None and not model:
        raise click.UsageError("--model is missing: how long an answer gets depends on who gives it.")
    if call_id is not None and (no_memory or model or role or limit):
        raise click.UsageError("a stored call has its own model, role and limit, and is in the memory.")
    forecaster = NeuralForecaster.load(weights, QuantileTracker(LEVELS), FollowTheLeader(LEVELS))
    state_dir: Path = ctx.obj["state_dir"]
    if call_id is not None:
        records, record = _up_to(finished_calls(state_dir, config, _LEARNT), call_id)
        vector = vector_of(record, forecaster.encoder)
        if vector is None:
            raise PredictorError(
                f"the call {call_id} cannot be explained by the encoder {forecaster.encoder.version}: it was read by "
                f"{record.encoder or 'none'}; name the weights of that time with --weights."
            )
        model, role = record.model, role_of(record)
        limit = record.work_limit
        learnt = _learnt(replay(forecaster, records))
        found = explain_vector(forecaster, vector, model=model, role=role, limit=limit or math.inf)
    else:
        record = None
        prompt = cut(text.encode() if text is not None else _read(source or file))
        records = [] if no_memory else finished_calls(state_dir, config, _LEARNT, or_none=True)
        learnt = _learnt(replay(forecaster, records))
        found = explain_prompt(forecaster, prompt, model=model or "", role=role, limit=limit or math.inf)
        vector = forecaster.encoder.encode_one(prompt)
    data = {
        "model": model,
        "role": role,
        "limit": limit,
        "call": None if record is None else _of_call(record),
        "learnt_from": learnt,
        "explanation": _explained(found),
        "nearest": [asdict(neighbour) for neighbour in nearest(forecaster, vector, records)],
    }
    show(ctx, data, lambda console: print_explanation(console, data))


@predictor.command("report")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write to.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Judge on the test split of this folder (prompts.parquet, lengths.parquet) instead of on finished calls.",
)
@click.option("--last", default=_LEARNT, show_default=True, type=click.IntRange(1, 100_000), help="How many calls.")
@_WEIGHTS
@_CONFIG
@click.pass_context
def report_command(
    ctx: click.Context, out: Path, data: Path | None, last: int, weights: Path | None, config: Path | None
) -> None:
    """Report how good length forecasts are: report.html, report.json and plots (PNG), in one folder.

    Judged are the last calls in the database of --state-dir or --config, or the test split of --data.
    """
    from swarmx.neural.forecaster import NeuralForecaster, shipped_weights
    from swarmx.neural.leader import FollowTheLeader
    from swarmx.neural.report import PredictorReport, cards_in, served, sets_of_calls
    from swarmx.neural.tracking import QuantileTracker
    from swarmx.report_page import write_report

    folder = weights or shipped_weights()
    forecaster = NeuralForecaster.load(folder)
    if data is not None:
        judged = _training("swarmx.neural.training.judged")
        with _progress(ctx, "reading and forecasting"):
            sets = judged.sets_of_data(forecaster, data)
        title, said = f"Length forecasts on the test split of {data.name}", []
    else:
        forecaster.correction = QuantileTracker(forecaster.head.spec.levels)
        forecaster.leader = FollowTheLeader(forecaster.head.spec.levels)
        records = finished_calls(ctx.obj["state_dir"], config, last)
        title, said = f"Length forecasts of the last {len(records)} finished calls", served(records)
        sets = sets_of_calls(forecaster, records)
    notes = () if sets else (f"None of these calls was read by the encoder {forecaster.encoder.version}.",)
    report = PredictorReport(
        title=title,
        weights="those that ship" if weights is None else str(weights),
        sets=tuple(sets),
        served=tuple(said),
        cards=tuple(cards_in(folder)),
        notes=notes,
    )
    files = write_report(out, report, _training("swarmx.neural.training.plots"))
    shown = {"files": [str(path) for path in files], "report": msgspec.to_builtins(report)}
    show(ctx, shown, lambda console: print_report(console, report, files))


@click.command()
@click.argument("heads", nargs=-1, type=click.Choice(HEADS), metavar="[HEADS]...")
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder with the training files."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the weights.")
@click.option("--seed", default=0, show_default=True, help="The same data and seed give the same weights.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep every epoch in this folder, and go on from there after a break.",
)
@click.option("--licence", default=UNSTATED, show_default=True, help="What the cards say of the licences of the data.")
@click.option(
    "--encoder",
    type=click.Choice(SLOW),
    help="Train the length head to read this slower encoder, for predictor.encoder.",
)
@click.option(
    "--encoder-weights",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the isomorphic encoder's own weights.",
)
@click.option(
    "--from-memory", is_flag=True, help="Train the length head again on the calls in --state-dir, or --config."
)
@click.option("--force", is_flag=True, help="With --from-memory: write the head even if it is not better.")
@_WEIGHTS
@_CONFIG
@click.pass_context
def train(
    ctx: click.Context,
    heads: tuple[str, ...],
    data: Path | None,
    out: Path,
    seed: int,
    resume: Path | None,
    licence: str,
    encoder: str | None,
    encoder_weights: Path | None,
    from_memory: bool,
    force: bool,
    weights: Path | None,
    config: Path | None,
) -> None:
    """Train the HEADS length, latency, structure and image (default: all) from files, or one again from memory.

    --data is a folder with the folders prompts (length), engine (latency, image) and agents (structure), or one of
    these. --from-memory takes the length head in --weights, and writes a new one to --out if it does better on calls
    that were held back.
    """
    from swarmx.neural.encoders import make_encoder

    if from_memory:
        if heads not in ((), ("length",)) or data is not None or resume is not None or encoder is not None:
            raise click.UsageError(
                "--from-memory trains the head length on finished calls, without --data, --resume and --encoder."
            )
        records = finished_calls(ctx.obj["state_dir"], config, _LEARNT)
        result = _from_memory(records, weights, out, force)
        show(ctx, result, lambda console: print_retrained(console, result))
        return
    if data is None:
        raise click.UsageError("name the folder with the training files, --data DIR, or train --from-memory.")
    if force or weights is not None:
        raise click.UsageError("--force and --weights belong to --from-memory.")
    if encoder is not None and heads != ("length",):
        raise click.UsageError("an encoder is read by the length head alone: train length --encoder NAME.")
    run = _training("swarmx.neural.training.run")
    cards = []
    names = heads or HEADS
    common = {"seed": seed, "resume": resume, "licence": licence}
    with _progress(ctx, "training", total=len(names)) as bar:
        for name in names:
            if encoder is not None:
                slow = make_encoder(encoder, encoder_weights)
                cards += run.train_adapted(slow, data, out, progress=bar.said, **common)
            else:
                cards += run.train([name], data, out, progress=bar.said, **common)
            bar.advance()
    told = [
        {"version": card.version, "counts": card.counts, "metrics": card.metrics, "calibration": card.calibration}
        for card in cards
    ]
    result = {"out": str(out), "weights": told}
    show(ctx, result, lambda console: print_trained(console, result))


COMMANDS = (predictor, train)


def _read(file: Any) -> bytes:
    raw: bytes = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise ConfigError(f"the prompt has more than {_MOST_BYTES >> 20} MiB; give a shorter one.")
    return raw


def _up_to(records: list[CallRecord], call_id: str) -> tuple[list[CallRecord], CallRecord]:
    """The calls that had ended when this one became ready, and its record. Raises NotFound."""
    for record in records:
        if record.call_id == call_id:
            return [other for other in records if other.ended_at_s <= record.ready_at_s], record
    raise NotFound(f"no call {call_id!r} is among the last {len(records)} that finished; `swarmx show` lists calls.")


def _learnt(forecasts: Iterable[Any]) -> int:
    """Forecasts that are made for what is learnt on the way; returns how many."""
    return sum(1 for _ in forecasts)


def _of_call(record: CallRecord) -> dict[str, Any]:
    """What a record says of its forecast and its outcome."""
    names = ("call_id", "forecast_p50", "forecast_p90", "forecast_source", "forecast_version", "work_done")
    return {name: getattr(record, name) for name in names}


def _explained(found: Explanation) -> dict[str, Any]:
    """As JSON, with each factor beside its logarithm."""
    data = asdict(found)
    data["moves"] = [asdict(move) | {"factor": move.factor} for move in found.moves]
    data["words"] = [asdict(move) | {"factor": move.factor} for move in found.words]
    return data


def _training(module: str) -> Any:
    """A module that needs the extra. Raises PredictorError without it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise PredictorError(f"training and reports need the extra swarmx[train] ({error}); {_EXTRA}.") from None


class _Bar:
    """What work says of itself, on stderr, so that --json stays JSON."""

    def __init__(self, bar: Progress, what: str, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task(what, total=total)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def said(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def advance(self) -> None:
        self._bar.advance(self._task)


def _progress(ctx: click.Context, what: str, total: int | None = None) -> _Bar:
    parts = SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    return _Bar(Progress(*parts, console=Console(stderr=True, markup=False), transient=True), what, total)


def _from_memory(records: list[CallRecord], weights: Path | None, out: Path, force: bool) -> dict[str, Any]:
    """Train the length head again. Raises PredictorError."""
    from swarmx.neural.checkpoint import load_head, save_head
    from swarmx.neural.encoders.hashed import NAME as ENCODER
    from swarmx.neural.forecaster import NeuralForecaster, shipped_weights
    from swarmx.neural.heads.length import MEMORY
    from swarmx.neural.refit import weighted_loss
    from swarmx.neural.training.retrain import Job, held_back, retrain
    from swarmx.runtime.length_rows import length_table

    folder = weights or shipped_weights()
    forecaster = NeuralForecaster.load(folder)
    head, card = load_head(folder, forecaster.head.spec)
    job = Job(spec=head.spec)
    rows = length_table(records, spec=head.spec, encoder=forecaster.encoder, memory=forecaster.memory.copy())
    table = held_back(rows, job.half_life)
    checked = table.part("validation")
    new = retrain(head, table, job)
    before, after = weighted_loss(head, checked), weighted_loss(new, checked)
    better = after < before * (1.0 - job.gain)
    version = ""
    if better or force:
        for name in (ENCODER, MEMORY) if out.resolve() != folder.resolve() else ():
            for ending in ("safetensors", "json"):
                out.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / f"{name}.{ending}", out / f"{name}.{ending}")
        story: dict[str, Any] = {
            "licence": f"{card.licence}; trained again on the calls of one place",
            "data": {"memory": "records of finished calls"},
            "counts": {"train": len(table) - len(checked), "validation": len(checked)},
            "metrics": {"held_back_loss": after, "held_back_loss_before": before},
            "settings": {"method": job.method, "half_life": job.half_life, "before": card.version},
        }
        version = save_head(out, new, story).version
    return {
        "rows": len(table),
        "held_back": len(checked),
        "loss_before": before,
        "loss_after": after,
        "better": better,
        "before": card.version,
        "version": version,
        "out": str(out),
    }

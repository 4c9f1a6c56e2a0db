"""Agent sessions as training data of the structure head: a row for every moment at which a workflow can be asked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from swarmx.core.errors import PredictorError
from swarmx.neural.head import Floats, Head
from swarmx.neural.heads.remaining_memory import EVERY_MODEL, Recall, RemainingMemory, Sums, Trail
from swarmx.neural.heads.structure import FEATURES, OPTIONAL, SPECS, features
from swarmx.neural.heads.text_marks import Marks, marks_of
from swarmx.neural.heads.workflow_so_far import WorkflowSoFar
from swarmx.neural.net import Floats32
from swarmx.neural.splits import Split, split_of
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings, fit

FILE = "sessions.parquet"
_COLUMNS = {
    "session": pl.String, "dataset": pl.String, "domain": pl.String, "task": pl.String, "step": pl.Int64,
    "t_rel_s": pl.Float64, "kind": pl.String, "agent": pl.String, "model": pl.String, "input_tokens": pl.Float64,
    "output_tokens": pl.Float64, "latency_s": pl.Float64, "tool": pl.String, "text_tail": pl.String,
}  # fmt: skip
_NUMBERS = ("step", "t_rel_s", "input_tokens", "output_tokens", "latency_s")
SETTINGS = FitSettings(nets=3, hidden=48, epochs=20, patience=6, batch=1024, dropout=0.2)

_NO_MODEL = "?"
_FEW = 4  # sessions of its kind that a half-known row's memory has


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCall:
    """One model call of a session. Seconds count from its beginning, NaN where the file has no clock."""

    role: str
    model: str
    prompt_tokens: float
    output_tokens: float
    arrived_s: float
    ended_s: float
    tool: str | None
    marks: Marks | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One recorded workflow; `ended_s` is NaN where the file does not say how long its last call took."""

    session: str
    dataset: str
    domain: str
    kind: str
    split: Split
    ended_s: float
    calls: tuple[SessionCall, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureRows:
    """Rows with what evaluation asks about them beside the tables; every array is [rows].

    `arrived` and `ended` count calls; `waiting` is true at the arrival of a call, false after its answer; `model` is
    "" for the whole workflow; `known` says what the memory had of the kind: "all" (all but this session) or "few".
    `recalled` [rows, 4] is what it said of each quantity.
    """

    tables: dict[str, Table]
    recalled: dict[str, Floats]
    session: NDArray[np.str_]
    dataset: NDArray[np.str_]
    domain: NDArray[np.str_]
    kind: NDArray[np.str_]
    model: NDArray[np.str_]
    arrived: NDArray[np.int64]
    ended: NDArray[np.int64]
    waiting: NDArray[np.bool_]
    known: NDArray[np.str_]


def load_sessions(path: Path) -> list[Session]:
    """The sessions of a file, or of `sessions.parquet` in a folder. Raises PredictorError naming file and column.

    A session belongs to the split of its task, so that no task of the test is ever trained on, whichever model or
    harness worked on it; one without a task to the split of its own id.
    """
    file = path / FILE if path.is_dir() else path
    frame = _read(file)
    sessions = []
    for (name,), steps in frame.sort("step").group_by("session", maintain_order=True):
        calls = tuple(_calls(steps))
        if not calls:
            continue
        first = steps.row(0, named=True)
        dataset, domain, task = (first[column] or "" for column in ("dataset", "domain", "task"))
        split = split_of("task", f"{domain}:{task}") if task else split_of("session", str(name))
        ends = [call.ended_s for call in calls]
        sessions.append(
            Session(
                session=str(name),
                dataset=dataset,
                domain=domain,
                kind=f"{dataset}/{domain}",
                split=split,
                ended_s=max(ends) if all(math.isfinite(end) for end in ends) else math.nan,
                calls=calls,
            )
        )
    if not sessions:
        raise PredictorError(f"{file} holds no model call (kind 'llm'); give a file with sessions in it.")
    return sorted(sessions, key=lambda session: session.session)


def trail_of(session: Session) -> Trail:
    """What the memory keeps of a session."""
    trail = Trail()
    for call in session.calls:
        trail.call_arrived(call.model)
        trail.call_ended(call.model, call.output_tokens, call.ended_s)
    return trail


def parts_of(session: Session) -> dict[str, Sums]:
    """What a session adds to a memory, by model."""
    trail = trail_of(session)
    names = dict.fromkeys([EVERY_MODEL, *trail.models])
    return {name: trail.sums(name, ended_s=session.ended_s) for name in names}


def memory_of(sessions: Sequence[Session]) -> RemainingMemory:
    """A memory that has seen these sessions."""
    memory = RemainingMemory()
    for session in sessions:
        memory.add(session.kind, parts_of(session))
    return memory


def rows_of(
    sessions: Sequence[Session], *, remembered: Sequence[str] = ("train",), copies: bool = True, seed: int = 0
) -> StructureRows:
    """All moments of all sessions. The memory knows the sessions of the splits `remembered`, never the one asked about.

    With `copies`, rows of training sessions come twice, with a memory that knows their kind and with one that has
    seen a few sessions of it, so that the head learns how far to trust it; the second ones have lost the clock, the
    tools or the text now and then, as fronts that cannot see them do. Validation and test rows come once, with the
    memory that serving would have had.
    """
    parts = {session.session: parts_of(session) for session in sessions}
    memory = RemainingMemory()
    by_kind: dict[str, list[Session]] = defaultdict(list)
    for session in sessions:
        if session.split in remembered:
            memory.add(session.kind, parts[session.session])
            by_kind[session.kind].append(session)
    rows = _Rows()
    rng = np.random.default_rng(seed)
    for session in sessions:
        own = parts[session.session]
        if session.split in remembered:
            memory.add(session.kind, own, weight=-1.0)
        rows.of(session, memory, "all", rng)
        if session.split in remembered:
            memory.add(session.kind, own)
    for kind, members in by_kind.items() if copies else ():
        for session in members:
            memory.add(kind, parts[session.session], weight=-1.0)
        for session in members:
            others = [other for other in members if other is not session]
            few = [others[i] for i in rng.permutation(len(others))[: rng.integers(1, _FEW + 1)]]
            for other in few:
                memory.add(kind, parts[other.session])
            if session.split == "train":
                rows.of(session, memory, "few", rng)
            for other in few:
                memory.add(kind, parts[other.session], weight=-1.0)
        for session in members:
            memory.add(kind, parts[session.session])
    return rows.done()


def replay(session: Session) -> Iterator[tuple[WorkflowSoFar, bool]]:
    """The workflow as it was at its beginning, at every call's arrival (True) and after its answer (False)."""
    workflow = WorkflowSoFar(kind=session.kind, submitted_at_s=0.0)
    yield workflow, False
    for call in session.calls:
        workflow.call_arrived(
            role=call.role, model=call.model, prompt_tokens=call.prompt_tokens, at_s=call.arrived_s, marks=call.marks
        )
        yield workflow, True
        workflow.call_finished(model=call.model, output_tokens=call.output_tokens, at_s=call.ended_s, tool=call.tool)
        yield workflow, False


_GROUPS = {name: [FEATURES.index(feature) for feature in group] for name, group in OPTIONAL.items()}


class _Rows:
    """Columns that grow by a session at a time."""

    def __init__(self) -> None:
        self._x: list[Floats32] = []
        self._recalled: dict[str, list[Recall]] = {quantity: [] for quantity in SPECS}
        self._targets: dict[str, list[float]] = {quantity: [] for quantity in SPECS}
        self._facts: list[tuple[Session, str, int, int, bool, str]] = []

    def of(self, session: Session, memory: RemainingMemory, known: str, rng: np.random.Generator) -> None:
        models = list(dict.fromkeys(call.model for call in session.calls))
        subjects = [EVERY_MODEL, *(models if len(models) > 1 else ())]
        for workflow, waiting in replay(session):
            arrived, ended = workflow.arrived, workflow.done
            hidden = [] if known == "all" else [g for g in _GROUPS.values() if rng.random() < 0.25]
            whole = memory.recall(session.kind, EVERY_MODEL, arrived, ended)
            for model in subjects:
                recalled = whole if model == EVERY_MODEL else memory.recall(session.kind, model, arrived, ended)
                x = features(workflow, recalled, whole[0], model=model)
                for group in hidden:
                    x[group] = np.nan
                self._x.append(x)
                for quantity, known_of_it in zip(SPECS, recalled, strict=True):
                    self._recalled[quantity].append(known_of_it)
                at_s = workflow.last_at_s if arrived else 0.0
                self._target(session, model, arrived, ended, math.nan if at_s is None else at_s)
                self._facts.append((session, model, arrived, ended, waiting, known))

    def _target(self, session: Session, model: str, arrived: int, ended: int, at_s: float) -> None:
        every = model == EVERY_MODEL
        self._targets["calls"].append(sum(every or call.model == model for call in session.calls[arrived:]))
        self._targets["work"].append(
            sum(call.output_tokens for call in session.calls[ended:] if every or call.model == model)
        )
        rest_s = session.ended_s - at_s if every else math.nan
        self._targets["path"].append(rest_s if math.isnan(rest_s) else max(0.0, rest_s))

    def done(self) -> StructureRows:
        x = np.stack(self._x)
        sessions, models, arrived, ended, waiting, known = zip(*self._facts, strict=True)
        split = np.array([s.split for s in sessions])
        kinds = np.array([s.kind for s in sessions])
        weight = np.where(np.array(models) == EVERY_MODEL, 1.0, 0.5)
        recalled = {quantity: np.array(known, dtype=np.float64) for quantity, known in self._recalled.items()}
        tables = {
            quantity: Table(
                features=x,
                anchor=recalled[quantity][:, 0],
                target=np.array(self._targets[quantity], dtype=np.float64),
                censored=np.zeros(len(x), dtype=np.bool_),
                weight=weight,
                group=kinds,
                split=split,
            )
            for quantity in SPECS
        }
        return StructureRows(
            tables=tables,
            recalled=recalled,
            session=np.array([s.session for s in sessions]),
            dataset=np.array([s.dataset for s in sessions]),
            domain=np.array([s.domain for s in sessions]),
            kind=kinds,
            model=np.array(models),
            arrived=np.array(arrived),
            ended=np.array(ended),
            waiting=np.array(waiting),
            known=np.array(known),
        )


def where(rows: StructureRows, chosen: NDArray[np.bool_]) -> StructureRows:
    """The rows for which `chosen` [rows] is true."""
    names = ("session", "dataset", "domain", "kind", "model", "arrived", "ended", "waiting", "known")
    return replace(
        rows,
        tables={quantity: table.where(chosen) for quantity, table in rows.tables.items()},
        recalled={quantity: known[chosen] for quantity, known in rows.recalled.items()},
        **{name: getattr(rows, name)[chosen] for name in names},
    )


def told(rows: StructureRows, quantity: str) -> Table:
    """The table of one head: the rows whose truth the files tell."""
    table = rows.tables[quantity]
    return table.where(np.isfinite(table.target))


def train_structure(rows: StructureRows, settings: FitSettings = SETTINGS) -> dict[str, Head]:
    """The three heads, by quantity.

    They come without conformal shifts: a split has some sixty sessions for calibration, whose rows hang together, and
    shifts from so few did worse on the test split than none; online tracking has to do it. Raises PredictorError.
    """
    return {quantity: fit(told(rows, quantity), spec, settings) for quantity, spec in SPECS.items()}


def _read(file: Path) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PredictorError(f"the sessions {file} cannot be read: {error}.") from None
    missing = [column for column in _COLUMNS if column not in frame.columns]
    if missing:
        raise PredictorError(f"{file} has no column {missing[0]!r}; sessions need {', '.join(_COLUMNS)}.")
    columns = []
    for column, kind in _COLUMNS.items():
        try:
            columns.append(frame[column].cast(kind))
        except pl.exceptions.PolarsError:
            raise PredictorError(
                f"{file}: the column {column!r} is {frame[column].dtype}, expected {kind()}."
            ) from None
    frame = pl.DataFrame(columns)
    for column in ("session", "step", "kind"):
        if frame[column].null_count():
            raise PredictorError(f"{file}: the column {column!r} is empty in {frame[column].null_count()} rows.")
    for column in _NUMBERS:
        values = frame[column].drop_nulls().to_numpy()
        bad = values[~np.isfinite(values) | (values < 0)]
        if len(bad):
            raise PredictorError(f"{file}: the column {column!r} holds {bad[0]}, expected a number from 0 on.")
    calls = frame.filter(pl.col("kind") == "llm")
    if calls["output_tokens"].null_count():
        raise PredictorError(
            f"{file}: the column 'output_tokens' is empty in {calls['output_tokens'].null_count()} model calls."
        )
    return frame


def _calls(steps: pl.DataFrame) -> Iterator[SessionCall]:
    looked = steps["tool"].null_count() < len(steps)
    for row in steps.iter_rows(named=True):
        if row["kind"] != "llm":
            continue
        at_s, latency_s = row["t_rel_s"], row["latency_s"]
        # The files give the end of a call where they know its latency, and its beginning where they do not.
        known = at_s is not None
        ended_s = at_s if known and latency_s is not None else math.nan
        text = row["text_tail"]
        yield SessionCall(
            role=row["agent"] or "",
            model=row["model"] or _NO_MODEL,
            prompt_tokens=float(row["input_tokens"] or 0.0),
            output_tokens=float(row["output_tokens"]),
            arrived_s=max(0.0, at_s - (latency_s or 0.0)) if known else math.nan,
            ended_s=ended_s,
            tool=(row["tool"] or "") if looked else None,
            marks=marks_of(text) if text is not None else None,
        )

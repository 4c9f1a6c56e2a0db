"""The structure head: how many calls, how much work and how long a path a workflow still has before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from swarmx.core.forecast import LEVELS, Forecast, Unit
from swarmx.neural.head import Floats, Head, HeadSpec
from swarmx.neural.heads.remaining_memory import EVERY_MODEL, QUANTITIES, SOFTENING, Recall
from swarmx.neural.heads.text_marks import CLOSING, MARKS
from swarmx.neural.heads.workflow_so_far import WorkflowSoFar
from swarmx.neural.net import Floats32

_UNKNOWN = math.nan

_RECALLED = tuple(f"recalled_{q}_{part}" for q in QUANTITIES for part in ("mean", "spread"))
_MEMORY = (*_RECALLED, "recalled_ending", "evidence", "whole_calls_mean", "whole_ending")
_COUNTS = ("arrived", "log_arrived", "in_flight", "most_in_flight", "failed", "roles", "models", "turns", "role_share")
_TOKENS = ("output", "output_mean", "output_last", "output_longest", "prompt_first", "prompt_last", "prompt_growth",
           "prompt_shrank", "work_by_pace")  # fmt: skip
_TIMES = ("elapsed", "pace", "gap_mean", "gap_last", "path_by_pace")
_TOOLS = ("asks_tool", "tool_share", "tools_in_row", "messages_in_row", "tools_distinct", "tools_repeated")
_TEXT = (*(f"text_{mark}" for mark in MARKS), *(f"earlier_{mark}" for mark in CLOSING), "closings")
_MODEL = ("of_one_model", "model_share", "model_arrived", "model_is_last", "model_since", "model_output_share")

FEATURES = (*_MEMORY, *_COUNTS, *_TOKENS, *_TIMES, *_TOOLS, *_TEXT, *_MODEL)

ENOUGH = 16.0
"""The evidence (about four workflows, seen around the same number of calls) from which on the network is trusted."""

OPTIONAL = {"times": _TIMES, "tools": _TOOLS, "text": _TEXT}
"""Features that not every front can fill, by group: NaN where nobody looked, and trained for that."""

_MOST_LOG = 40.0
_Z = np.array([NormalDist().inv_cdf(level) for level in LEVELS])
_MARK_PLACES = tuple(MARKS.index(mark) for mark in CLOSING)

_UNITS: tuple[Unit, ...] = ("calls", "tokens", "s")

SPECS: dict[str, HeadSpec] = {
    quantity: HeadSpec(name=f"remaining_{quantity}", version=1, features=FEATURES, unit=unit, softening=softening)
    for quantity, unit, softening in zip(QUANTITIES, _UNITS, SOFTENING, strict=True)
}
"""By quantity. "calls" have not arrived yet; "work" are output tokens of calls that have not ended; "path" are seconds
until the workflow ends. All three read the same features; "calls" and "work" can be asked about one model."""


def features(
    workflow: WorkflowSoFar,
    recalled: tuple[Recall, Recall, Recall],
    whole: Recall,
    *,
    model: str = EVERY_MODEL,
) -> Floats32:
    """The row [features] of a workflow, or of one model's part in it; NaN where nothing is known.

    `recalled` is what `RemainingMemory` says about the same subject, `whole` what it says of all the calls.
    """
    w = workflow
    calls, work, path = recalled
    values = [
        calls.mean, calls.spread, work.mean, work.spread, path.mean, path.spread,
        calls.ending, math.log1p(calls.evidence), whole.mean, whole.ending,
    ]  # fmt: skip
    values += _counts(w)
    values += _tokens(w, calls)
    values += _times(w, calls)
    values += _tools(w)
    values += _text(w)
    values += _model(w, model)
    return np.array(values, dtype=np.float32)


def anchor(recalled: tuple[Recall, Recall, Recall], quantity: str) -> float:
    """What is expected without the network: log(rest + softening), from the memory."""
    return recalled[QUANTITIES.index(quantity)].mean


def remaining_quantiles(head: Head, rows: Floats32, recalled: Floats, groups: Sequence[str] | str = "") -> Floats:
    """Quantiles [rows, K] in the head's unit: the network's where the kind is known, the memory's where it is new.

    `rows` [rows, features] are those of `features`, `recalled` [rows, 4] what the memory says of this quantity.
    """
    return trusted(head.log_quantiles(rows, recalled[:, 0], groups), recalled, head.spec.softening)


def trusted(log_q: Floats, recalled: Floats, softening: float) -> Floats:
    """Quantiles [rows, K] from the network's log quantiles and what the memory says.

    With less than `ENOUGH` evidence of the kind the logarithms are averaged, level by level. A network is worse than
    the memory of all workflows, by up to three times, where the kind is unlike those that it was trained on, and
    nothing in the features tells which kinds are.
    """
    trust = np.minimum(1.0, recalled[:, 3:] / ENOUGH)
    if trust.min() < 1.0:
        log_q = trust * log_q + (1.0 - trust) * (recalled[:, :1] + recalled[:, 1:2] * _Z)
    q: Floats = np.exp(np.clip(log_q, -_MOST_LOG, _MOST_LOG)) - softening
    return np.maximum(q, 0.0, out=q)


def recalled_quantiles(recalled: Floats, quantity: str) -> Floats:
    """Quantiles [rows, K] of the memory alone, log-normal."""
    log_q = np.minimum(recalled[:, :1] + recalled[:, 1:2] * _Z, _MOST_LOG)
    q: Floats = np.exp(log_q) - SPECS[quantity].softening
    return np.maximum(q, 0.0, out=q)


def recalled_forecast(recalled: tuple[Recall, Recall, Recall], quantity: str) -> Forecast:
    """The memory's own word, without a network: log-normal, "prior" as long as no workflow of the kind speaks."""
    spec, known = SPECS[quantity], recalled[QUANTITIES.index(quantity)]
    return Forecast(
        levels=LEVELS,
        quantiles=tuple(recalled_quantiles(np.array([known]), quantity)[0].tolist()),
        unit=spec.unit,
        source="empirical" if known.evidence >= 1.0 else "prior",
        version="recalled-1",
    )


def _counts(w: WorkflowSoFar) -> list[float]:
    n = max(1, w.arrived)
    return [
        float(w.arrived),
        math.log1p(w.arrived),
        float(w.in_flight),
        float(w.most_in_flight),
        math.log1p(w.failed),
        float(len(w.roles)),
        float(len(w.models)),
        w.turns / n,
        w.roles.get(w.last_role, 0) / n,
    ]


def _tokens(w: WorkflowSoFar, calls: Recall) -> list[float]:
    mean = w.output_tokens / w.done if w.done else _UNKNOWN
    return [
        math.log1p(w.output_tokens),
        math.log1p(mean),
        math.log1p(w.last_output_tokens) if w.done else _UNKNOWN,
        math.log1p(w.longest_output_tokens) if w.done else _UNKNOWN,
        math.log1p(w.first_prompt_tokens) if w.arrived else _UNKNOWN,
        math.log1p(w.last_prompt_tokens) if w.arrived else _UNKNOWN,
        math.log1p(max(0.0, w.prompt_growth)),
        math.log1p(max(0.0, -w.prompt_growth)),
        math.log1p(mean * math.exp(calls.mean)),
    ]


def _times(w: WorkflowSoFar, calls: Recall) -> list[float]:
    if w.last_at_s is None or not math.isfinite(w.last_at_s):
        return [_UNKNOWN] * len(_TIMES)
    elapsed_s = max(0.0, w.last_at_s - w.submitted_at_s)
    ended = w.done + w.failed
    pace_s = elapsed_s / ended if ended else _UNKNOWN
    return [
        math.log1p(elapsed_s),
        math.log1p(pace_s),
        math.log1p(w.gaps_s / max(1, w.arrived - 1)),
        math.log1p(w.last_gap_s),
        math.log1p(pace_s * math.exp(calls.mean)),
    ]


def _tools(w: WorkflowSoFar) -> list[float]:
    if not w.answers:
        return [_UNKNOWN] * len(_TOOLS)
    return [
        1.0 if w.last_tool else 0.0,
        w.tool_calls / w.answers,
        float(max(0, w.tool_run)),
        float(max(0, -w.tool_run)),
        math.log1p(len(w.tools)),
        math.log1p(w.repeats),
    ]


def _text(w: WorkflowSoFar) -> list[float]:
    if w.marks is None:
        return [_UNKNOWN] * len(_TEXT)
    earlier = w.earlier_marks or (0.0,) * len(MARKS)
    return [*w.marks, *(earlier[place] for place in _MARK_PLACES), math.log1p(w.closings)]


def _model(w: WorkflowSoFar, model: str) -> list[float]:
    if model == EVERY_MODEL:
        return [0.0, 1.0, math.log1p(w.arrived), 1.0, 0.0, 1.0]
    share = w.models.get(model)
    if share is None:
        return [1.0, 0.0, 0.0, 0.0, math.log1p(w.arrived), 0.0]
    return [
        1.0,
        share.arrived / max(1, w.arrived),
        math.log1p(share.arrived),
        1.0 if w.last_model == model else 0.0,
        math.log1p(w.arrived - share.last),
        share.output_tokens / w.output_tokens if w.output_tokens > 0.0 else _UNKNOWN,
    ]

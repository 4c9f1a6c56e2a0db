"""What a predictor report says: how forecasts did on finished calls or on a test split, and what the cards promise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from swarmx.core.forecast import LEVELS, Forecast
from swarmx.core.records import CallRecord
from swarmx.neural.checkpoint import Card
from swarmx.neural.forecaster import NeuralForecaster, role_of
from swarmx.neural.replayed import replay, vector_of
from swarmx.neural.scores import ScoreSet, score_set


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """How the forecasts that calls were sent with did, by who made them: the share of outcomes at or below each."""

    source: str
    rows: int
    at_p50: float
    at_p90: float


class PredictorReport(msgspec.Struct, frozen=True, kw_only=True):
    """`sets` in the order in which they are read; `cards` are those of the weights, `served` what records say."""

    title: str
    weights: str
    sets: tuple[ScoreSet, ...]
    served: tuple[Served, ...]
    cards: tuple[Card, ...]
    notes: tuple[str, ...] = ()


def cards_in(folder: Path) -> list[Card]:
    """The cards of all weights in a folder, by name; files that are none are passed over."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Card))
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return found


def sets_of_calls(forecaster: NeuralForecaster, records: Sequence[CallRecord]) -> list[ScoreSet]:
    """Finished text calls, oldest first, forecast once more in their order by `forecaster`, which learns from them."""
    kept: list[CallRecord] = []
    forecasts: list[Forecast] = []
    for record, forecast in replay(forecaster, records):
        kept.append(record)
        forecasts.append(forecast)
    if not kept:
        return []
    encoder = forecaster.encoder
    vectors = [vector_of(record, encoder) for record in kept]
    labels = {
        "model": np.array([record.model for record in kept]),
        "role": np.array([role_of(record) for record in kept]),
        "device": np.array([record.device or "unknown" for record in kept]),
        "kind of text": np.array([f"kind{encoder.kind_of(v)}" for v in vectors if v is not None]),
        "history": np.array(["none" if f.source == "prior" else "seen before" for f in forecasts]),
    }
    return [
        score_set(
            "Finished calls",
            "Each call, forecast by these weights from what had ended when it became ready: their memory, and "
            "what follows their outcomes, begin with the first of these calls.",
            np.array([record.work_done for record in kept]),
            np.array([forecast.quantiles for forecast in forecasts]),
            LEVELS,
            labels,
        )
    ]


def served(records: Sequence[CallRecord]) -> list[Served]:
    """What finished text calls say of the forecasts that they were sent with, whoever made them."""
    found: dict[str, list[CallRecord]] = {}
    for record in records:
        if record.kind == "llm" and record.state == "finished" and record.work_done > 0.0:
            found.setdefault(record.forecast_source, []).append(record)
    return [
        Served(
            source=source,
            rows=len(rows),
            at_p50=float(np.mean([r.work_done <= r.forecast_p50 for r in rows])),
            at_p90=float(np.mean([r.work_done <= r.forecast_p90 for r in rows])),
        )
        for source, rows in sorted(found.items())
    ]

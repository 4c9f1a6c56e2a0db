"""The book of forecasts, filled in with what was found to forecast with."""

from __future__ import annotations

from swarmx.config import PredictorSection
from swarmx.neural.report import cards_in
from swarmx.runtime.forecast_book import ForecastBook
from swarmx.runtime.forecasting import GuardedForecaster
from swarmx.runtime.scoring import LENGTH_HEAD
from swarmx.wiring.predictors import Forecasters, weights_folder


def forecast_book(wanted: PredictorSection, found: Forecasters) -> ForecastBook:
    """Heads are those of the folder of weights; none where plain statistics serve."""
    first = found.first
    return ForecastBook(
        engine=wanted.engine,
        cards=[] if found.neural is None else cards_in(weights_folder(wanted)),
        in_force={} if found.neural is None else {LENGTH_HEAD: found.neural.head.version},
        missing=found.missing,
        resting=(lambda: first.resting) if isinstance(first, GuardedForecaster) else lambda: False,
    )

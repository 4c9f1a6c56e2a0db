"""The forecaster of a Serve router: the house predictor, with plain statistics where it does not do."""

from __future__ import annotations

import logging
from collections.abc import Callable

from swarmx.compat.ray_serve.options import RouterOptions
from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS
from swarmx.core.messages import Message
from swarmx.core.ports import Forecaster
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.tracking import QuantileTracker
from swarmx.runtime.clock import Clock
from swarmx.runtime.forecasting import GuardedForecaster

log = logging.getLogger(__name__)

_BUDGET_S = 0.002


def forecaster(options: RouterOptions, *, clock: Clock, post: Callable[[Message], None]) -> Forecaster:
    """Who forecasts for one router; bad or missing weights leave the plain one."""
    plain = EmpiricalForecaster()
    if options.predictor == "empirical":
        return plain
    try:
        primary = NeuralForecaster.load(None, QuantileTracker(LEVELS))
    except PredictorError as error:
        log.warning("the neural predictor is missing, plain statistics stand in: %s", error)
        return plain
    return GuardedForecaster(primary, plain, name=primary.name, budget_s=_BUDGET_S, clock=clock, post=post)

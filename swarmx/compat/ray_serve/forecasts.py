"""The forecasters of a Serve router: plain statistics at once, and the house predictor, which reads the prompt."""

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
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.tracking import QuantileTracker
from swarmx.runtime.clock import Clock
from swarmx.runtime.forecasting import GuardedForecaster

log = logging.getLogger(__name__)

_BUDGET_S = 0.002


def forecasters(
    options: RouterOptions, *, clock: Clock, post: Callable[[Message], None]
) -> tuple[Forecaster, Forecaster | None]:
    """Who forecasts at once, and who reads prompts and takes longer, and teaches both; None where nobody does, by the
    options or for want of sound weights."""
    alike = EmpiricalForecaster()
    if options.predictor == "empirical":
        return alike, None
    try:
        reader = NeuralForecaster.load(None, QuantileTracker(LEVELS), FollowTheLeader(LEVELS))
    except PredictorError as error:
        log.warning("the neural predictor is missing, plain statistics stand in: %s", error)
        return alike, None
    return alike, GuardedForecaster(reader, alike, name=reader.name, budget_s=_BUDGET_S, clock=clock, post=post)

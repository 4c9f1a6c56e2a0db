"""Who forecasts: the predictor that the settings ask for, and plain statistics where it cannot be had."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from swarmx.config import PredictorSection
from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS, Forecast
from swarmx.core.messages import AlertRaised, Message
from swarmx.core.ports import Encoder, Forecaster
from swarmx.core.prompts import Encoding
from swarmx.gateway.predictor_metrics import PredictorMetrics
from swarmx.neural.checkpoint import load_head
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.neural.encoders import make_encoder
from swarmx.neural.forecaster import NeuralForecaster, shipped_weights
from swarmx.neural.heads.remaining_memory import load_remaining_memory
from swarmx.neural.heads.structure import SPECS
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.structure_live import WorkflowForecasts
from swarmx.neural.tracking import QuantileTracker
from swarmx.runtime.clock import Clock
from swarmx.runtime.forecasting import GuardedForecaster
from swarmx.runtime.path_forecasts import PathForecasts
from swarmx.runtime.refining import Refiner
from swarmx.runtime.reliance import Reliance
from swarmx.wiring.tasks import running_task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasters:
    """`first` forecasts every call at once, and `neural` is the trained one behind it; `second` reads with a slow
    `encoder`. `missing` names what the settings ask for and cannot be had."""

    first: Forecaster
    neural: NeuralForecaster | None = None
    encoder: Encoder | None = None
    second: Forecaster | None = None
    missing: tuple[str, ...] = ()

    def announce(self, post: Callable[[Message], None], metrics: PredictorMetrics) -> None:
        """Tell operators what is missing; the server runs without it."""
        for name in self.missing:
            metrics.replaced("missing")
            post(AlertRaised(kind="predictor_fallback", subject=name))


async def forecasters(
    wanted: PredictorSection, *, clock: Clock, post: Callable[[Message], None], metrics: PredictorMetrics
) -> Forecasters:
    """What the settings ask for, or what comes nearest: bad weights keep no server from starting.

    Slow encoders load their libraries in a thread.
    """
    plain = EmpiricalForecaster()
    if wanted.engine == "empirical":
        return Forecasters(first=plain)
    try:
        primary = NeuralForecaster.load(wanted.weights, *_learning(wanted))
    except PredictorError as error:
        log.warning("the neural predictor is missing, plain statistics stand in: %s", error)
        return Forecasters(first=plain, missing=("neural",))
    first = GuardedForecaster(
        primary,
        plain,
        name=primary.name,
        budget_s=wanted.budget_ms / 1000.0,
        clock=clock,
        post=post,
        rest_s=wanted.rest_s,
        learns=wanted.adapt,
        on_forecast=metrics.took,
        on_rest=metrics.replaced,
    )
    metrics.watch_resting(lambda: first.resting)
    if wanted.encoder == "hashed":
        return Forecasters(first=first, neural=primary)
    try:
        encoder, second = await asyncio.to_thread(_second, wanted)
    except PredictorError as error:
        log.warning("the encoder %s is missing, first forecasts stand: %s", wanted.encoder, error)
        return Forecasters(first=first, neural=primary, missing=(wanted.encoder,))
    return Forecasters(first=first, neural=primary, encoder=encoder, second=second)


async def refiner(
    found: Forecasters,
    wanted: PredictorSection,
    stack: AsyncExitStack,
    *,
    clock: Clock,
    post: Callable[[Message], None],
    metrics: PredictorMetrics,
    on_refined: Callable[[str, Encoding, Forecast], None],
) -> Refiner | None:
    """Second forecasts, running until `stack` closes; None without a slow encoder."""
    if found.encoder is None or found.second is None:
        return None
    made = Refiner(
        found.encoder,
        found.second,
        clock=clock,
        post=post,
        on_refined=on_refined,
        on_outcome=metrics.refined,
        oldest_s=wanted.refine_within_s,
        rest_s=wanted.rest_s,
        learns=wanted.adapt,
    )
    await stack.enter_async_context(running_task(made.run(), name="second forecasts"))
    return made


def weights_folder(wanted: PredictorSection) -> Path:
    """Where the weights are: those that ship, unless the settings name others."""
    return wanted.weights or shipped_weights()


def workflow_forecasts(wanted: PredictorSection) -> tuple[WorkflowForecasts, bool]:
    """Forecasts of what workflows still have before them: by the heads that are there, else by memory alone; and
    whether there are any heads, which have a use for prompts."""
    if wanted.engine == "empirical":
        return WorkflowForecasts(), False
    folder = weights_folder(wanted)
    try:
        made, heads = WorkflowForecasts(memory=load_remaining_memory(folder)), 0
    except PredictorError as error:
        log.warning("what workflows have before them is learnt from nothing: %s", error)
        made, heads = WorkflowForecasts(), 0
    for quantity, spec in SPECS.items():
        try:
            made.use(quantity, load_head(folder, spec)[0])
            heads += 1
        except PredictorError as error:
            log.warning("remaining %s of workflows is forecast from memory: %s", quantity, error)
    return made, heads > 0


def path_forecasts(
    workflows: WorkflowForecasts,
    wanted: PredictorSection,
    *,
    clock: Clock,
    post: Callable[[Message], None],
    metrics: PredictorMetrics,
) -> PathForecasts:
    """What the router is told of the rest of workflows, within the time that a forecast may take."""
    reliance = Reliance(
        "workflows",
        budget_s=wanted.budget_ms / 1000.0,
        clock=clock,
        post=post,
        rest_s=wanted.rest_s,
        on_rest=metrics.replaced,
    )
    return PathForecasts(workflows, reliance)


def _second(wanted: PredictorSection) -> tuple[Encoder, Forecaster]:
    """A slow encoder and who forecasts from what it has read; its libraries are an extra. Raises PredictorError."""
    if wanted.encoder_weights is None:
        raise PredictorError(
            f'predictor.encoder = "{wanted.encoder}" needs predictor.encoder_weights, the folder that '
            f"`swarmx train length --encoder {wanted.encoder}` wrote."
        )
    slow = make_encoder(wanted.encoder, wanted.encoder_weights)
    return NeuralForecaster.load_second(wanted.encoder_weights, slow, *_learning(wanted))


def _learning(wanted: PredictorSection) -> tuple[QuantileTracker, FollowTheLeader] | tuple[None, None]:
    """What follows the outcomes of a head while it serves."""
    return (QuantileTracker(LEVELS), FollowTheLeader(LEVELS)) if wanted.adapt else (None, None)

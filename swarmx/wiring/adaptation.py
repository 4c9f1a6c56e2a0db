"""Predictors that learn: the agent that watches forecasts, and who trains and swaps weights at its word."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from swarmx.agents.learner import LearnerAgent, LearnerSettings
from swarmx.config import PredictorSection
from swarmx.core.actions import Retrain, UsePredictor
from swarmx.core.errors import PredictorError, StoreError
from swarmx.core.messages import Message
from swarmx.core.ports import SchedulerAgent
from swarmx.core.prompts import Encoding
from swarmx.core.records import CallRecord
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.replayed import call_of
from swarmx.neural.table import Table
from swarmx.runtime.length_rows import length_table
from swarmx.runtime.live import Performer
from swarmx.runtime.retraining import Retraining, Trainable, in_force
from swarmx.runtime.scoring import LENGTH_HEAD
from swarmx.wiring.predictors import Forecasters

log = logging.getLogger(__name__)

_REMEMBERED = 500  # calls; a moment at the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What joins the switchboard (`agents`) and the live shell (`performers`, by type of action)."""

    agents: tuple[SchedulerAgent, ...] = ()
    performers: Mapping[type, Performer] = field(default_factory=dict)


def adaptation(
    wanted: PredictorSection,
    found: Forecasters,
    stack: AsyncExitStack,
    *,
    newest: Callable[[int], Awaitable[list[CallRecord]]],
    folder: Path,
    post: Callable[[Message], None],
) -> Adaptation:
    """Nothing where no weights are in force, or `predictor.retrain` is off. New weights go to `folder`."""
    if not (wanted.retrain and wanted.adapt) or found.neural is None:
        return Adaptation()
    retraining = Retraining({LENGTH_HEAD: trainable(found.neural)}, newest=newest, folder=folder, post=post)
    stack.push_async_callback(retraining.close)
    return Adaptation(
        agents=(LearnerAgent(LearnerSettings(trainable=(LENGTH_HEAD,))),),
        performers={Retrain: retraining.perform_retrain, UsePredictor: retraining.perform_use},
    )


async def remember(
    wanted: PredictorSection,
    found: Forecasters,
    *,
    newest: Callable[[int], Awaitable[list[CallRecord]]],
    folder: Path,
) -> None:
    """Begin where the last life ended: with the weights that were in force, and knowing its last calls."""
    if found.neural is not None and wanted.retrain and wanted.adapt:
        try:
            head = await asyncio.to_thread(in_force, folder, found.neural.head.spec, found.neural.encoder.version)
            if head is not None:
                found.neural.swap(head)
        except PredictorError as error:
            log.warning("the weights that were in force cannot be used, those of the start are: %s", error)
    try:
        records = await newest(_REMEMBERED)
    except StoreError as error:
        log.warning("the calls of the last life cannot be read, nothing is learnt from them: %s", error)
        return
    for record in records:
        if record.work_done > 0.0:  # zero is what a record has whose answer did not say how long it was
            vector = np.frombuffer(record.encoding, dtype="<f2").astype(np.float32)
            found.first.observe(call_of(record), Encoding(encoder=record.encoder, vector=vector), record.work_done)
            await asyncio.sleep(0)


def trainable(forecaster: NeuralForecaster) -> Trainable:
    """The length head of a forecaster."""
    at_start = forecaster.memory.copy()

    def table_of(records: Sequence[CallRecord]) -> Table:
        return length_table(records, spec=forecaster.head.spec, encoder=forecaster.encoder, memory=at_start)

    return Trainable(
        head=lambda: forecaster.head, table_of=table_of, swap=forecaster.swap, reads=forecaster.encoder.version
    )

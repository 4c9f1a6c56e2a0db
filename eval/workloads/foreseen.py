"""What the shipped predictor says of each call of a workload, with what it would have learnt by then when live."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.workloads.draft import Draft, DraftCall
from eval.workloads.invented import constant
from swarmx.core.forecast import LEVELS
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding, PromptText, cut
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.tracking import QuantileTracker

LAG = int(constant("outcome_lag"))
"""So many calls later the outcome of a call is known."""

NORMAL = np.array([NormalDist().inv_cdf(level) for level in LEVELS])
"""The standard normal's quantiles at `LEVELS`, [levels]."""


class _Asked(NamedTuple):
    call: Call
    encoding: Encoding
    work: float


def foresee(drafts: Sequence[Draft], forecaster: NeuralForecaster | None = None) -> NDArray[np.float32]:
    """Quantiles of the work of all calls in their order, [calls, levels].

    The forecaster is the live one with its tracking: it reads the prompt's text, knows the role and the model that was
    recorded (`Drawn.data_model`), and hears of each outcome `LAG` calls later. It begins as it ships, without having
    seen any of the roles. What guards it when live, time limits above all, has no part here.
    """
    forecaster = forecaster or NeuralForecaster.load(None, QuantileTracker(LEVELS))
    read: dict[str, Encoding] = {}
    running: deque[_Asked] = deque()
    quantiles = np.empty((sum(len(draft.calls) for draft in drafts), len(LEVELS)), dtype=np.float32)
    row = 0
    for draft in drafts:
        for made in draft.calls:
            if made.drawn is None:
                quantiles[row] = known_work(made)
            else:
                text = made.drawn.text
                prompt = cut(text.encode())
                call = _call(draft, made, prompt, row)
                if text not in read:
                    read[text] = forecaster.encode(call, prompt)
                quantiles[row] = forecaster.forecast(call, read[text]).quantiles
                running.append(_Asked(call, read[text], float(made.work)))
                if len(running) > LAG:
                    forecaster.observe(*running.popleft())
            row += 1
    return quantiles


def known_work(call: DraftCall) -> NDArray[np.float64]:
    """Quantiles of work that the request tells, up to a lognormal factor of known width, [levels]."""
    return call.expected * np.exp(call.doubt * NORMAL)


def _call(draft: Draft, made: DraftCall, prompt: PromptText, row: int) -> Call:
    assert made.drawn is not None
    return Call(
        call_id=str(row), tenant="default", kind=made.kind, model=made.drawn.data_model, role=made.role,
        workflow_id=str(draft.number), workflow_kind=draft.kind, node=made.role, prompt_key="",
        prompt_bytes=prompt.total_bytes, prompt_tokens=made.drawn.prompt_tokens, work_limit=made.work_limit,
    )  # fmt: skip

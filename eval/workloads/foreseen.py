"""What the shipped predictor says of each call of a workload, with what it would have learnt by then when live."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.workloads.draft import Draft, DraftCall
from eval.workloads.invented import constant
from eval.workloads.plan import RoleMeans
from swarmx.core.forecast import LEVELS
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding, cut
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.tracking import QuantileTracker

LAG = int(constant("outcome_lag"))
"""So many workflows later have all answers of one been heard.

What is foreseen must not depend on when workflows arrive, so this takes the place of time: at the highest rate of the
headline matrix, no workflow takes longer, alone in the system, than so many others take to arrive.
"""

PAST = int(constant("past_workflows"))
"""So many workflows ended before the first one of a workload came."""

NORMAL = np.array([NormalDist().inv_cdf(level) for level in LEVELS])
"""The standard normal's quantiles at `LEVELS`, [levels]."""


class _Asked(NamedTuple):
    call: Call
    encoding: Encoding
    work: float


def foresee(
    drafts: Sequence[Draft],
    past: Sequence[Draft] = (),
    forecaster: NeuralForecaster | None = None,
    *,
    lag: int = LAG,
) -> NDArray[np.float32]:
    """Quantiles of the work of all calls in their order, [calls, levels].

    The forecaster is the live one with its tracking: it reads the prompt's text, knows the role and the model that was
    recorded (`Drawn.data_model`), and has heard every answer of the workflows `past`, and of those at least `lag`
    earlier than the one that asks. So an answer teaches nobody who could have asked before it came, not even the next
    call of its own workflow. What guards the forecaster when live, time limits above all, has no part here.
    """
    forecaster = forecaster or NeuralForecaster.load(None, QuantileTracker(LEVELS))
    read: dict[str, Encoding] = {}
    for draft in past:
        for each in _asked(draft, forecaster, read):
            forecaster.observe(*each)
    unheard: deque[list[_Asked]] = deque()
    quantiles: list[NDArray[np.float64]] = []
    for draft in drafts:
        if len(unheard) == lag:
            for each in unheard.popleft():
                forecaster.observe(*each)
        asked = list(_asked(draft, forecaster, read))
        said = (np.array(forecaster.forecast(each.call, each.encoding).quantiles) for each in asked)
        quantiles += [known_work(made) if made.drawn is None else next(said) for made in draft.calls]
        unheard.append(asked)
    return np.array(quantiles, dtype=np.float32).reshape(-1, len(LEVELS))


def known_work(call: DraftCall) -> NDArray[np.float64]:
    """Quantiles of work that the request tells, up to a lognormal factor of known width, [levels]."""
    return call.expected * np.exp(call.doubt * NORMAL)


def means_of(past: Sequence[Draft]) -> RoleMeans:
    """What running means know of workflows that have ended: as much as the forecaster was taught."""
    means: dict[tuple[str, str, str], tuple[int, float]] = {}
    for draft in past:
        for made in draft.calls:
            if made.drawn is not None:
                key = (draft.kind, made.role, made.drawn.data_model)
                count, mean = means.get(key, (0, 0.0))
                means[key] = (count + 1, mean + (made.work - mean) / (count + 1))
    return means


def _asked(draft: Draft, forecaster: NeuralForecaster, read: dict[str, Encoding]) -> Iterator[_Asked]:
    """The draft's calls of language models; `read` has the texts that were read before."""
    for position, made in enumerate(draft.calls):
        drawn = made.drawn
        if drawn is None:
            continue
        prompt = cut(drawn.text.encode())
        call = Call(
            call_id=f"{draft.number}/{position}", tenant="default", kind=made.kind, model=drawn.data_model,
            role=made.role, workflow_id=str(draft.number), workflow_kind=draft.kind, node=made.role, prompt_key="",
            prompt_bytes=prompt.total_bytes, prompt_tokens=drawn.prompt_tokens, work_limit=made.work_limit,
        )  # fmt: skip
        if drawn.text not in read:
            read[drawn.text] = forecaster.encode(call, prompt)
        yield _Asked(call, read[drawn.text], float(made.work))

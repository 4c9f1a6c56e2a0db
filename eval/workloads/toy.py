"""Workloads without any data: the same kinds of workflows, with lengths that are lognormal and invented."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.workloads.arrivals import Arrivals, arrival_times
from eval.workloads.draft import LARGE, SDXL, Drawn, DrawnImage, Turn
from eval.workloads.drawing import draw_workflows, planned, timed
from eval.workloads.foreseen import NORMAL, known_work
from eval.workloads.invented import Inventions
from eval.workloads.kinds import KINDS
from eval.workloads.plan import Workload

TOY_KINDS = tuple(KINDS)

_SIGMA = 0.6  # of the logarithm of a length, within a role and model
_LENGTHS: Mapping[str, float] = {LARGE: 250.0}
_MEDIAN, _STEPS = 150.0, {SDXL: (4, 10, 28, 30, 40)}
_LIMIT = 4096.0


def toy(
    count: int,
    rate_per_s: float,
    seed: int,
    kinds: Sequence[str] | Mapping[str, float] = TOY_KINDS,
    *,
    arrivals: Arrivals = "poisson",
    r2: float = 0.5,
    vary: float = 1.0,
) -> Workload:
    """`count` workflows of these kinds (all alike, or with weights), arriving at `rate_per_s` together.

    Forecasts know the share `r2` of the variance of log lengths and how wide they are, so they are calibrated.
    """
    mix = dict(kinds) if isinstance(kinds, Mapping) else dict.fromkeys(kinds, 1.0)
    drafts = draw_workflows(_Lognormal(), mix, count, seed, Inventions(vary=vary))
    rng = np.random.default_rng([seed, 0x70F])
    quantiles: list[NDArray[np.float64]] = []
    for draft in drafts:
        for call in draft.calls:
            if call.kind == "llm":
                quantiles.append(_forecast(call.work, call.model, call.work_limit, r2, rng))
            else:
                quantiles.append(known_work(call))
    times = arrival_times(arrivals, count, rate_per_s, seed)
    return Workload(name="toy", workflows=timed(planned(drafts), times), quantiles=np.array(quantiles, np.float32))


def _forecast(work: int, model: str, limit: float, r2: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """The posterior of a lognormal length after a noisy look at it: its mean explains `r2` of the variance."""
    usual = math.log(_LENGTHS.get(model, _MEDIAN))
    look = r2 * (math.log(work) - usual) + math.sqrt(r2 * (1.0 - r2)) * _SIGMA * rng.standard_normal()
    spread = _SIGMA * math.sqrt(1.0 - r2)
    return np.minimum(np.exp(usual + look + spread * NORMAL), limit)


@dataclass(frozen=True, slots=True)
class _Lognormal:
    """Implements `draft.Truth` by inventing it."""

    def llm(self, role: str, model: str, rng: np.random.Generator) -> Drawn:
        hint = float(rng.standard_normal())
        work = _LENGTHS.get(model, _MEDIAN) * math.exp(_SIGMA * rng.standard_normal())
        return Drawn(
            text="", data_model=model, prompt_tokens=max(1, round(80.0 * math.exp(0.8 * hint))),
            work=min(int(_LIMIT), max(1, round(work))), work_limit=_LIMIT, hint=hint,
        )  # fmt: skip

    def image(self, model: str, rng: np.random.Generator) -> DrawnImage:
        return DrawnImage(int(rng.choice(_STEPS.get(model, (20,)))))

    def session(self, rng: np.random.Generator) -> Sequence[Turn]:
        turns: list[Turn] = []
        size = 1500 + int(rng.integers(1000))
        for _ in range(2 + int(rng.geometric(0.12))):
            drawn = self.llm("sessions/agent", "", rng)
            turns.append(
                Turn(
                    role="agent", gap_s=0.0 if not turns else float(rng.exponential(0.5)), shared="toy",
                    shared_tokens=1200, drawn=_longer(drawn, size),
                )
            )  # fmt: skip
            size += drawn.work + 20 + int(rng.exponential(150.0))
        return turns


def _longer(drawn: Drawn, prompt_tokens: int) -> Drawn:
    return Drawn(
        text="", data_model=drawn.data_model, prompt_tokens=prompt_tokens, work=drawn.work,
        work_limit=drawn.work_limit,
    )  # fmt: skip

"""From a seed to workflows: which kind comes when, each drawn by itself, and made into what a simulation reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from eval.workloads.draft import Draft, Truth
from eval.workloads.invented import Inventions
from eval.workloads.kinds import KINDS
from eval.workloads.plan import PlannedCall, PlannedWorkflow
from eval.workloads.text import BlockNames, tokens_of
from swarmx.core.errors import ConfigError


def draw_workflows(
    truth: Truth, mix: Mapping[str, float], count: int, seed: int, inventions: Inventions
) -> list[Draft]:
    """The first `count` workflows of this seed, with their truth. Raises ConfigError for a kind or weight that is none.

    Nothing here depends on the rate or on how workflows arrive, and the first ones not on how many follow.
    """
    if unknown := sorted(set(mix) - set(KINDS)):
        raise ConfigError(f"there is no workflow kind {unknown[0]!r}, expected one of {', '.join(KINDS)}.")
    if not mix or not all(0.0 <= weight < np.inf for weight in mix.values()) or not sum(mix.values()) > 0.0:
        raise ConfigError(f"the weights {dict(mix)} make no mix, expected numbers from 0 on, some above it.")
    names = sorted(mix)
    shares = np.cumsum([mix[name] for name in names])
    places = np.random.default_rng([seed, 0x313]).random(count) * shares[-1]
    drafts: list[Draft] = []
    for number, which in enumerate(np.searchsorted(shares, places, side="right").tolist()):
        rng = np.random.default_rng([seed, number])
        draft = Draft(kind=names[which], number=number, truth=truth, inventions=inventions, rng=rng)
        KINDS[draft.kind](draft)
        drafts.append(draft)
    return drafts


def planned(drafts: Sequence[Draft]) -> list[PlannedWorkflow]:
    """The workflows of these drafts, all at second 0; call `i` of them all has row `i` of the forecasts."""
    names, row = BlockNames(), 0
    made: list[PlannedWorkflow] = []
    for draft in drafts:
        calls: list[PlannedCall] = []
        for call in draft.calls:
            calls.append(
                PlannedCall(
                    role=call.role, model=call.model, kind=call.kind, after=call.after, gap_s=call.gap_s,
                    prompt_tokens=tokens_of(call.prompt), work=float(call.work), work_limit=call.work_limit,
                    blocks=names.of((*call.prompt, call.answer)), forecast=row,
                    recorded=call.drawn.data_model if call.drawn else "",
                )
            )  # fmt: skip
            row += 1
        workflow_id = f"{draft.kind}-{draft.number:06d}"
        made.append(
            PlannedWorkflow(
                workflow_id=workflow_id, kind=draft.kind, at_s=0.0, calls=tuple(calls), source=draft.source
            )
        )  # fmt: skip
    return made


def timed(workflows: Sequence[PlannedWorkflow], times_s: NDArray[np.float64]) -> list[PlannedWorkflow]:
    """The same workflows, submitted at these times, [workflows]."""
    return [
        msgspec.structs.replace(workflow, at_s=at_s) for workflow, at_s in zip(workflows, times_s.tolist(), strict=True)
    ]

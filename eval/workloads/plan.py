"""What a workload is: workflows with their truth, of which the agents see only what a live gateway would show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import LEVELS, Forecast
from swarmx.core.nouns import CallKind

BLOCK_TOKENS = 64  # of the engine model, and of the names in `PlannedCall.blocks`


class PlannedCall(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One call of a workflow. It becomes ready `gap_s` after the last of the calls `after` ended (or after the start).

    `after` are positions of earlier calls in the workflow. `prompt_tokens` and `work` (output tokens, or units of work
    of a serial server) are the truth; `work` is hidden from agents. `recorded` is the model whose answer it was: who
    forecasts is told it, as it stands for the model that is called. `blocks[i]` names the first i + 1 full blocks of
    the prompt followed by the answer: equal names are equal text. `forecast` is a row of `Workload.quantiles`.
    """

    role: str
    model: str
    kind: CallKind
    after: tuple[int, ...]
    gap_s: float
    prompt_tokens: int
    work: float
    work_limit: float
    blocks: tuple[int, ...]
    forecast: int
    recorded: str = ""


class PlannedWorkflow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One workflow, submitted at `at_s` seconds of virtual time; it ends with the last of its calls.

    `source` numbers the record that decides most about it: its session, the flow of its images, else its first prompt.
    Workflows of a kind with the same one are not independent, in whatever seed they are; None for an invented one.
    """

    workflow_id: str
    kind: str
    at_s: float
    calls: tuple[PlannedCall, ...]
    tenant: str = "default"
    source: int | None = None


RoleMeans = Mapping[tuple[str, str, str], tuple[int, float]]
"""By workflow kind, role and recorded model: calls that ended, and the mean of their output tokens."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Workflows in the order of `at_s`, and what the trained predictor says of the work of their calls.

    `quantiles` has shape [rows, levels], at the levels of `core.forecast.LEVELS`, in tokens or units of work. They
    were made before the simulation, each from what had surely ended when its workflow came (`foreseen`), some of it
    before the first one came: `role_means` are what running means begin with then.
    """

    name: str
    workflows: Sequence[PlannedWorkflow]
    quantiles: NDArray[np.float32]
    role_means: RoleMeans = {}

    @property
    def calls(self) -> int:
        """Calls of all workflows."""
        return sum(len(workflow.calls) for workflow in self.workflows)


def forecast_of(workload: Workload, call: PlannedCall) -> Forecast:
    """What the trained predictor said of the call."""
    row = workload.quantiles[call.forecast].astype(float).tolist()
    return Forecast(
        levels=LEVELS, quantiles=tuple(row), unit="tokens" if call.kind == "llm" else "work", source="neural"
    )

"""What came of a simulation: arrays by workflow, call and replica, and the figures that are reported of them."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Workflows(msgspec.Struct, frozen=True, kw_only=True):
    """One entry a workflow, in the order of submission; `kind` is a position in `Outcome.kinds`.

    `end_s` is NaN for a workflow that had not ended when the run did. A `refused` one ended, but without its result.
    `unloaded_s` is what it takes in an empty system, on devices of middling speed.
    """

    kind: Ints
    at_s: Floats
    end_s: Floats
    unloaded_s: Floats
    calls: Ints
    refused: Bools


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """One entry a call, workflow by workflow; times are NaN where that did not happen.

    `workflow`, `model` and `replica` are positions in `Outcome.workflows`, `models` and `replica_ids`; `replica` is the
    one that it was sent to last, and as many as there are where it was sent to none. `end_s` is when it finished.
    """

    workflow: Ints
    model: Ints
    replica: Ints
    ready_s: Floats
    dispatched_s: Floats
    first_token_s: Floats
    end_s: Floats
    prompt_tokens: Ints
    cached_tokens: Ints
    work: Floats
    attempts: Ints


class Replicas(msgspec.Struct, frozen=True, kw_only=True):
    """One entry a replica, in the order of the fleet. `mean_batch` counts the calls that it has while it has any."""

    model: Ints
    busy_s: Floats
    mean_batch: Floats
    preemptions: Ints
    hit_tokens: Ints
    query_tokens: Ints
    output_tokens: Ints


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How often what happened in the whole run."""

    events: int
    messages: int
    dispatches: int
    retries: int
    cancels: int
    refusals: int
    alerts: dict[str, int]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run: it began at 0 and stopped at `stopped_s` of virtual time. Wall and CPU seconds are those of the
    simulator and the only fields that differ from run to run."""

    kinds: tuple[str, ...]
    models: tuple[str, ...]
    replica_ids: tuple[str, ...]
    workflows: Workflows
    calls: Calls
    replicas: Replicas
    counts: Counts
    stopped_s: float
    wall_s: float
    cpu_s: float

    def rows(self, kind: str | None = None, *, trim: float = 0.0) -> Ints:
        """Positions of the workflows of a kind, or of all, without the first `trim` of all that were submitted."""
        first = int(trim * len(self.workflows.at_s))
        chosen = np.ones(len(self.workflows.at_s), dtype=bool)
        if kind is not None:
            chosen = self.workflows.kind == self.kinds.index(kind)
        chosen[:first] = False
        return np.flatnonzero(chosen)

    def latency(self, kind: str | None = None, *, trim: float = 0.0) -> Floats:
        """Seconds from submission to end. What had not ended is censored at the end of the run; the refused are left
        out, as they have no result (`missed` counts them)."""
        rows = self.rows(kind, trim=trim)
        rows = rows[~self.workflows.refused[rows]]
        ends_s = np.where(np.isnan(self.workflows.end_s[rows]), self.stopped_s, self.workflows.end_s[rows])
        return ends_s - self.workflows.at_s[rows]

    def quantile(self, level: float, kind: str | None = None, *, trim: float = 0.0) -> float:
        """Of the latency; NaN where there is none."""
        latency = self.latency(kind, trim=trim)
        return float(np.quantile(latency, level)) if len(latency) else np.nan

    def p50(self, kind: str | None = None, *, trim: float = 0.0) -> float:
        return self.quantile(0.50, kind, trim=trim)

    def p95(self, kind: str | None = None, *, trim: float = 0.0) -> float:
        return self.quantile(0.95, kind, trim=trim)

    def p99(self, kind: str | None = None, *, trim: float = 0.0) -> float:
        return self.quantile(0.99, kind, trim=trim)

    def missed(self, kind: str, slo_s: float, *, trim: float = 0.0) -> float:
        """The share of workflows of a kind that took longer than `slo_s`, had no end, or were refused."""
        rows = self.rows(kind, trim=trim)
        good = self.workflows.end_s[rows] - self.workflows.at_s[rows] <= slo_s  # false for NaN
        return float(1.0 - (good & ~self.workflows.refused[rows]).mean()) if len(rows) else np.nan

    def slowdown(self, kind: str | None = None, *, trim: float = 0.0) -> Floats:
        """Latency over what the same workflow takes in an empty system."""
        rows = self.rows(kind, trim=trim)
        rows = rows[~self.workflows.refused[rows]]
        return self.latency(kind, trim=trim) / np.maximum(self.workflows.unloaded_s[rows], 1e-9)

    def utilisation(self, model: str) -> Floats:
        """The share of the run in which each replica of the model had a call."""
        rows = self.replicas.model == self.models.index(model)
        shares: Floats = self.replicas.busy_s[rows] / max(self.stopped_s, 1e-9)
        return shares

    def jain_index(self, model: str) -> float:
        """How even the replicas of a model are used: 1 when all alike, 1/n when one does it all (Jain et al. 1984)."""
        use = self.utilisation(model)
        return float(use.sum() ** 2 / (len(use) * (use**2).sum())) if use.any() else 1.0

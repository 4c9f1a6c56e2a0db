"""The books of a simulation: lists while it runs, which are quick to write to, and an `Outcome` in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from eval.sim.flow import LiveCall
from eval.sim.outcome import Calls, Counts, Outcome, Replicas, Workflows
from eval.sim.replicas import SimReplica
from eval.workloads.plan import Workload
from swarmx.core.nouns import Replica

_NAN = math.nan


class Ledger:
    """Calls are counted through: those of workflow `w` begin at `first[w]`."""

    def __init__(self, workload: Workload, fleet: Sequence[Replica]) -> None:
        self._workload = workload
        self._fleet = fleet
        sizes = [len(workflow.calls) for workflow in workload.workflows]
        self.first = [0, *accumulate(sizes)]
        calls, workflows = self.first[-1], len(sizes)
        self._prompt_tokens = [call.prompt_tokens for workflow in workload.workflows for call in workflow.calls]
        self.cached_tokens = [0] * calls
        self.messages = self.cancels = self.refusals = 0
        self._dispatches = self._retries = 0
        self._alerts: dict[str, int] = {}
        self._end_s, self._unloaded_s = [_NAN] * workflows, [_NAN] * workflows
        self._refused = [False] * workflows
        self._replica, self._attempts = [len(fleet)] * calls, [0] * calls
        self._ready_s, self._dispatched_s = [_NAN] * calls, [_NAN] * calls
        self._first_token_s, self._call_end_s = [_NAN] * calls, [_NAN] * calls

    def submitted(self, workflow: int, unloaded_s: float) -> None:
        self._unloaded_s[workflow] = unloaded_s

    def ready(self, live: LiveCall, now_s: float) -> None:
        self._ready_s[live.number] = now_s

    def dispatched(self, live: LiveCall, now_s: float) -> None:
        number = live.number
        self._dispatches += 1
        self._retries += live.attempt > 1
        self._attempts[number] = live.attempt
        self._replica[number] = live.replica
        self._dispatched_s[number] = now_s

    def admitted(self, calls: Sequence[LiveCall], cached_tokens: int) -> None:
        """An engine found so many prompt tokens of these calls in its cache.

        It tells the sum only: of calls that are admitted in one go, each gets a share by the length of its prompt.
        """
        left_tokens = sum(live.planned.prompt_tokens for live in calls)
        for live in calls:
            tokens = live.planned.prompt_tokens
            share = min(tokens, -(-cached_tokens * tokens // left_tokens)) if tokens else 0
            self.cached_tokens[live.number] = share
            cached_tokens, left_tokens = cached_tokens - share, left_tokens - tokens

    def began(self, live: LiveCall, now_s: float) -> None:
        self._first_token_s[live.number] = now_s

    def finished(self, live: LiveCall, now_s: float) -> None:
        self._call_end_s[live.number] = now_s

    def ended(self, workflow: int, now_s: float, *, refused: bool) -> None:
        """Raises RuntimeError when it had ended before: that must never happen."""
        if not math.isnan(self._end_s[workflow]):
            raise RuntimeError(f"workflow {self._workload.workflows[workflow].workflow_id} ended twice")
        self._end_s[workflow] = now_s
        self._refused[workflow] = refused

    def alerted(self, kind: str) -> None:
        self._alerts[kind] = self._alerts.get(kind, 0) + 1

    def outcome(
        self, replicas: Sequence[SimReplica], *, stopped_s: float, events: int, wall_s: float, cpu_s: float
    ) -> Outcome:
        """What came of it."""
        workflows = self._workload.workflows
        planned = [call for workflow in workflows for call in workflow.calls]
        kinds = tuple(dict.fromkeys(workflow.kind for workflow in workflows))
        models = tuple(dict.fromkeys([*(replica.model for replica in self._fleet), *(call.model for call in planned)]))
        kind_of, model_of = {k: i for i, k in enumerate(kinds)}, {m: i for i, m in enumerate(models)}
        busy_s = np.array([r.busy_s for r in replicas], dtype=np.float64)
        call_s = np.array([r.call_s for r in replicas], dtype=np.float64)
        sizes = np.diff(self.first)
        return Outcome(
            kinds=kinds,
            models=models,
            replica_ids=tuple(replica.replica_id for replica in self._fleet),
            workflows=Workflows(
                kind=np.array([kind_of[workflow.kind] for workflow in workflows], dtype=np.int64),
                at_s=np.array([workflow.at_s for workflow in workflows], dtype=np.float64),
                end_s=np.array(self._end_s, dtype=np.float64),
                unloaded_s=np.array(self._unloaded_s, dtype=np.float64),
                calls=sizes.astype(np.int64),
                refused=np.array(self._refused, dtype=np.bool_),
            ),
            calls=Calls(
                workflow=np.repeat(np.arange(len(sizes)), sizes),
                model=np.array([model_of[call.model] for call in planned], dtype=np.int64),
                replica=np.array(self._replica, dtype=np.int64),
                ready_s=np.array(self._ready_s, dtype=np.float64),
                dispatched_s=np.array(self._dispatched_s, dtype=np.float64),
                first_token_s=np.array(self._first_token_s, dtype=np.float64),
                end_s=np.array(self._call_end_s, dtype=np.float64),
                prompt_tokens=np.array(self._prompt_tokens, dtype=np.int64),
                cached_tokens=np.array(self.cached_tokens, dtype=np.int64),
                work=np.array([call.work for call in planned], dtype=np.float64),
                attempts=np.array(self._attempts, dtype=np.int64),
            ),
            replicas=Replicas(
                model=np.array([model_of[replica.model] for replica in self._fleet], dtype=np.int64),
                busy_s=busy_s,
                mean_batch=call_s / np.maximum(busy_s, 1e-12),
                preemptions=np.array([r.preemptions for r in replicas], dtype=np.int64),
                hit_tokens=np.array([r.hit_tokens for r in replicas], dtype=np.int64),
                query_tokens=np.array([r.query_tokens for r in replicas], dtype=np.int64),
                output_tokens=np.array([r.output_tokens for r in replicas], dtype=np.int64),
            ),
            counts=Counts(
                events=events,
                messages=self.messages,
                dispatches=self._dispatches,
                retries=self._retries,
                cancels=self.cancels,
                refusals=self.refusals,
                alerts=self._alerts,
            ),
            stopped_s=stopped_s,
            wall_s=wall_s,
            cpu_s=cpu_s,
        )

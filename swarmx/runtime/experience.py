"""What the record of a call tells beside its outcome: its place in its workflow, and why it went where it went."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

from swarmx.core.nouns import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was known when an attempt was sent; the fields are those of `CallRecord`."""

    policy: str = ""
    ahead: int | None = None
    expected_s: float | None = None

    @classmethod
    def by(cls, decision: Decision | None) -> Self:
        """What the decision knew of the replica that it chose; nothing for a call that was never sent."""
        if decision is None:
            return cls()
        seen = decision.candidates
        row = seen.replica_ids.index(decision.replica_id)
        expected_s = None if seen.cost_s is None else seen.cost_s[row]
        return cls(policy=decision.policy, ahead=seen.in_flight[row], expected_s=expected_s)


class Positions:
    """Numbers the calls of each workflow in order of arrival, from 1.

    Counts `limit` workflows at most; beyond that the one that has been silent for longest starts again at 1, as does
    every workflow after a restart.
    """

    def __init__(self, *, limit: int = 20_000) -> None:
        self._limit = limit
        self._counts: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def next(self, workflow_id: str) -> int:
        """The number of the call that has just come; 0 for a call without a workflow."""
        if not workflow_id:
            return 0
        count = self._counts[workflow_id] = self._counts.pop(workflow_id, 0) + 1
        if len(self._counts) > self._limit:
            self._counts.popitem(last=False)
        return count

    def forget(self, workflow_id: str) -> None:
        """The workflow has ended."""
        self._counts.pop(workflow_id, None)

"""Workflows and calls on their way through a simulation."""

from __future__ import annotations

from dataclasses import dataclass, field

from eval.sim.paths import Rest
from eval.workloads.plan import PlannedCall, PlannedWorkflow
from swarmx.core.messages import CallReady


@dataclass(slots=True, kw_only=True, eq=False)
class Flow:
    """A workflow that runs: `number` in the workload, `first` the position of its first call in the
    outcome, `home` the router that it hashes to, `deciders` those that place its calls.

    `waits[i]` counts the calls that must end before call `i`, `then[i]` are those that wait for it.
    """

    planned: PlannedWorkflow
    number: int
    home: int
    deciders: tuple[int, ...]
    rest: Rest
    first: int = 0
    waits: list[int] = field(init=False)
    then: list[list[int]] = field(init=False)
    left: int = field(init=False)
    failed: bool = False
    live: dict[int, LiveCall] = field(default_factory=dict)  # by position

    def __post_init__(self) -> None:
        calls = self.planned.calls
        self.left = len(calls)
        self.waits = [len(call.after) for call in calls]
        self.then = [[] for _ in calls]
        for i, call in enumerate(calls):
            for before in call.after:
                self.then[before].append(i)


@dataclass(slots=True, kw_only=True, eq=False)
class LiveCall:
    """A call that is ready and has not ended. `placed` while its current attempt is on its way or at a replica."""

    flow: Flow
    position: int
    number: int
    call_id: str
    planned: PlannedCall
    router: int
    announced: CallReady | None = None
    attempt: int = 0
    placed: bool = False
    replica: int = 0
    streamed: bool = False
    first_token_s: float = 0.0
    ended: bool = False

    def is_at(self, attempt: int) -> bool:
        """Whether anybody still wants to hear of that attempt."""
        return self.placed and self.attempt == attempt and not self.ended

    def wants(self, name: str) -> bool:
        """Whether the request is its current attempt; others were given up, and may not know it yet."""
        return not self.ended and name == self.name(self.attempt)

    def name(self, attempt: int) -> str:
        """Of a request to an engine."""
        return self.call_id if attempt == 1 else f"{self.call_id}#{attempt}"

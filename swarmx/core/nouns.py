"""The nouns: calls, replicas, and what a router remembers of a decision. Immutable values, no behaviour.

Values cannot form cycles, so the garbage collector need not follow them (`gc=False`): its pauses are the tail of a
decision.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from swarmx.core.engine import EngineProfile
from swarmx.core.forecast import Forecast

CallKind = Literal["llm", "image", "tool"]
ReplicaState = Literal["starting", "ready", "cordoned", "draining", "gone"]
FailureReason = Literal[
    "connect", "timeout", "bad_answer", "connection_lost", "replica_gone", "replica_error", "busy", "rejected"
]
EngineOrder = Literal["arrival", "priority"]
"""Whom an engine admits first of those that wait in it; the words of `core.engine_order`."""
Priorities = Literal["ignored", "low_first", "high_first"]
"""What an engine makes of the `priority` of a request: nothing, or whom it serves first of those that wait in it."""
PRIORITIES = range(-10, 11)
"""What a call may ask for; higher is more urgent."""


class Call(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request to one model, as the scheduler sees it: features and references, never the prompt itself.

    The use of a tool is a call, too: its `model` is the pool of replicas that have it, its `role` the tool.

    `prompt_tokens` is an estimate from bytes; `work_limit` is what the client allows at most (output tokens,
    megapixel-steps of an image, or seconds of a tool); `deadline_at_s` is absolute, on the clock of the process that
    accepted the call. `prefix` names the beginnings of the prompt (`core.prefixes`), shortest first; calls of one
    `session` tend to continue each other's prompts. Of calls that wait, those of a higher `priority` go first. One that
    is for `once` must not be begun a second time: once it was sent, it is not tried elsewhere.
    """

    call_id: str
    tenant: str
    kind: CallKind
    model: str
    role: str
    workflow_id: str
    workflow_kind: str
    node: str
    prompt_key: str
    prompt_bytes: int
    prompt_tokens: int
    work_limit: float
    stream: bool = False
    deadline_at_s: float | None = None
    session: str = ""
    prefix: tuple[int, ...] = ()
    priority: int = 0
    once: bool = False


class Replica(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One server that answers calls for one model, or has one pool of tools, on one device.

    `priorities` is what its engine does with them.
    """

    replica_id: str
    model: str
    kind: CallKind
    device: str
    url: str
    profile: EngineProfile
    provider: str
    emulated: bool
    priorities: Priorities = "ignored"


class ReplicaGroup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Replicas that can be had on demand: one model on one device type from one provider.

    `min_replicas` and `max_replicas` are the bounds at the start, which operators may move between 0 and `limit`.
    `start_s` is a first guess of the wall time from Deploy to ready; what is seen replaces it. Their engines admit
    calls in `engine_order`.
    """

    group_id: str
    model: str
    kind: CallKind
    device: str
    provider: str
    profile: EngineProfile
    min_replicas: int
    max_replicas: int
    limit: int
    start_s: float
    engine_order: EngineOrder = "arrival"

    def replica(self, replica_id: str, url: str = "") -> Replica:
        """One of the group; without an address it does not answer yet."""
        return Replica(
            replica_id=replica_id,
            model=self.model,
            kind=self.kind,
            device=self.device,
            url=url,
            profile=self.profile,
            provider=self.provider,
            emulated=self.provider == "emulated",
            priorities="low_first" if self.engine_order == "priority" else "ignored",
        )


class KeptView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The columns of a fleet view that candidates do not name (`agents.kept_view`), little-endian.

    `chosen` is `last_chosen`, uint32 [rows]; `moving` float32 [columns, rows]; `fixed` float32 [profiles, columns] is
    what profiles tell, and `which` uint8 [rows] says whose profile is which.
    """

    chosen: bytes
    moving: bytes
    fixed: bytes
    which: bytes


class Candidates(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The part of the fleet view that a decision saw, by column; all columns have shape [rows].

    At most 32 rows are kept (the chosen one, its runner-up and the cheapest); `total` counts all that were eligible.
    Costs and their terms are None where the policy gave no finite number. `view` is None in decisions that older
    versions stored.
    """

    total: int
    replica_ids: tuple[str, ...]
    in_flight: tuple[int, ...]
    remaining_work: tuple[float, ...]
    context_tokens: tuple[float, ...]
    signal_age_s: tuple[float | None, ...]
    cost_s: tuple[float | None, ...] | None
    terms_s: dict[str, tuple[float | None, ...]]
    view: KeptView | None = None


class SeenWorkflow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a decision knew of the workflow: the fields of `core.fleet.WorkflowView`, without the past of its kind."""

    age_s: float
    target_s: float
    remaining_s: float
    attained_s: float
    attained_work: float
    calls: int
    others_s: float
    usual_s: float = 0.0
    usual_call_s: float = 0.0


class Decision(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Why a call went where it went.

    The call had `waited_s`, with `ahead` calls before it; `home` is the replica that served its session last.
    `workflow` is None in decisions that older versions stored.
    """

    call: Call
    attempt: int
    at_s: float
    policy: str
    parameters: dict[str, float]
    replica_id: str
    runner_up: str | None
    forecast: Forecast
    candidates: Candidates
    note: str = ""
    waited_s: float = 0.0
    ahead: int = 0
    home: str | None = None
    workflow: SeenWorkflow | None = None

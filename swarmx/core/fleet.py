"""What a policy sees: the call at hand with its workflow, and the candidate replicas as arrays."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Order = Literal["arrival", "workflow", "deadline", "slack", "attained", "gittins"]


class WorkflowView(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """What the router knows of a call's workflow; times in seconds.

    `age_s` since it was submitted; `target_s`, the time it should take in all; `remaining_s`, what is expected from
    now to its end with this call under way. Its finished calls took `attained_s` at replicas and did `attained_work`
    (output tokens, or units of work); `calls` of them have ended. `past_s` holds the service, sorted, of finished
    workflows of its kind, shape [workflows]. Other calls of it that are at replicas are expected to end within
    `others_s`, 0 when there are none. Workflows of its kind take `usual_s` from end to end, and their calls at this
    stage `usual_call_s` at a replica, on average; 0 where nobody knows, or `remaining_s` is of this very call.
    """

    kind: str
    age_s: float
    target_s: float
    remaining_s: float
    attained_s: float
    attained_work: float
    calls: int
    past_s: Floats
    others_s: float = 0.0
    usual_s: float = 0.0
    usual_call_s: float = 0.0

    @property
    def slack_s(self) -> float:
        """Seconds to spare until the target; below zero when it will be missed."""
        return self.target_s - self.age_s - self.remaining_s


class CallView(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """The call that wants a replica, with the forecast of its work (output tokens, or units of work).

    `ahead` calls of its model wait in this router and come before it, `home` is the position in the fleet view of the
    replica that served its session last, `waited_s` is how long it has been ready.
    """

    call: Call
    forecast: Forecast
    workflow: WorkflowView
    now_s: float = 0.0
    waited_s: float = 0.0
    ahead: int = 0
    home: int | None = None


class FleetView(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """The replicas that may take the call, never none; every array has shape [replicas].

    `in_flight` counts this router's own calls, exactly, with what signals tell of those of other routers; `last_chosen`
    is the number of the decision that last chose the replica, 0 before the first. `remaining_work` is the expected work
    that they still need and `work_variance` its variance, `weight` the sum of what policies said a second of each is
    worth (`Choice.weight`; what is usual for a call of other routers), `context_tokens` the context they hold, of which
    `shared_tokens` were in the cache when their calls came, so that several may hold the same. Of their prompts that
    no cache held, `prefill_tokens` are left if they are read at the device's rate, and `unread_tokens` are those of
    calls of which no first token, or without a stream no end, has been heard.

    `cached_tokens` of this call's prompt are held by the replica, as far as this router's own dispatches tell. Of late,
    `prefill_share` of its time went into prompts, and its calls took `slowdown` times as long as its profile says. The
    profile columns are those of `EngineProfile`. The signal columns are the engine's own word, NaN where it never
    spoke, `signal_age_s` old.
    """

    in_flight: Ints
    last_chosen: Ints
    max_batch: Ints
    remaining_work: Floats
    work_variance: Floats
    weight: Floats
    context_tokens: Floats
    prefill_tokens: Floats
    unread_tokens: Floats
    shared_tokens: Floats
    cached_tokens: Floats
    prefill_share: Floats
    slowdown: Floats
    kv_capacity_tokens: Floats
    max_step_tokens: Floats
    cost_weight: Floats
    call_base_s: Floats
    step_base_s: Floats
    decode_seq_s: Floats
    decode_ctx_token_s: Floats
    prefill_token_s: Floats
    prefill_ctx_token_s: Floats
    running: Floats
    waiting: Floats
    kv_usage: Floats
    signal_age_s: Floats

    def __len__(self) -> int:
        return len(self.in_flight)

    @property
    def room(self) -> Ints:
        """Calls that each can take before its batch is full, at least zero."""
        left: Ints = np.maximum(0, self.max_batch - self.in_flight)
        return left


class Choice(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """A policy's answer: a position in the view, and how it came about.

    With `hold`, the call waits in the router, for that replica or a better one, and is asked about again when
    something has changed. `urgency` is the order inside the engine, lower first. `expected_s` is how long the call
    should take there from now on; None where a policy does not know. `profile_s` is the same without regard to
    `slowdown`, `unit_s` of it for each unit of its work: what slowdown is learnt from, None for not at all. `weight`,
    above zero, is what a second of the call is worth, as `FleetView.weight` shows it to those that come later. `cost_s`
    and each array of `terms_s` have shape [replicas]; None where a policy does not weigh costs.
    """

    index: int
    hold: bool = False
    urgency: float = 0.0
    expected_s: float | None = None
    profile_s: float | None = None
    unit_s: float = 0.0
    weight: float = 1.0
    cost_s: Floats | None = None
    terms_s: dict[str, Floats] = {}

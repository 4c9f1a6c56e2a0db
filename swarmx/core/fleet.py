"""What a policy sees: the call at hand with its workflow, and the candidate replicas as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self, overload

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


COUNTS = ("in_flight", "last_chosen", "max_batch")
NAMED = ("remaining_work", "context_tokens", "signal_age_s")
"""What the candidates of a decision name (`nouns.Candidates`)."""
MOVING = (
    "work_variance",
    "weight",
    "prefill_tokens",
    "unread_tokens",
    "shared_tokens",
    "cached_tokens",
    "prefill_share",
    "slowdown",
    "running",
    "waiting",
    "kv_usage",
)
PROFILE = (
    "kv_capacity_tokens",
    "max_step_tokens",
    "cost_weight",
    "call_base_s",
    "step_base_s",
    "decode_seq_s",
    "decode_ctx_token_s",
    "prefill_token_s",
    "prefill_ctx_token_s",
)
"""Numbers of a replica's profile, but for its whole ones."""
_IN_FLIGHT, _MAX_BATCH = COUNTS.index("in_flight"), COUNTS.index("max_batch")
NUMBERS = (*NAMED, *MOVING, *PROFILE)
COLUMNS = (*COUNTS, *NUMBERS)


class _Count:
    """A row of `FleetView.counts`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._row = COUNTS.index(name)

    @overload
    def __get__(self, view: None, owner: type) -> Self: ...
    @overload
    def __get__(self, view: FleetView, owner: type) -> Ints: ...
    def __get__(self, view: FleetView | None, owner: type) -> Ints | Self:
        return self if view is None else view.counts[self._row]


class _Number:
    """A row of `FleetView.numbers`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._row = NUMBERS.index(name)

    @overload
    def __get__(self, view: None, owner: type) -> Self: ...
    @overload
    def __get__(self, view: FleetView, owner: type) -> Floats: ...
    def __get__(self, view: FleetView | None, owner: type) -> Floats | Self:
        return self if view is None else view.numbers[self._row]


class FleetView:
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

    All columns lie in two tables, `counts` [COUNTS, replicas] and `numbers` [NUMBERS, replicas], so that whoever needs
    many of them need not take them one by one. Raises TypeError where columns are missing, or there are others.
    """

    __slots__ = ("counts", "numbers")

    in_flight = _Count()
    last_chosen = _Count()
    max_batch = _Count()
    remaining_work = _Number()
    work_variance = _Number()
    weight = _Number()
    context_tokens = _Number()
    prefill_tokens = _Number()
    unread_tokens = _Number()
    shared_tokens = _Number()
    cached_tokens = _Number()
    prefill_share = _Number()
    slowdown = _Number()
    kv_capacity_tokens = _Number()
    max_step_tokens = _Number()
    cost_weight = _Number()
    call_base_s = _Number()
    step_base_s = _Number()
    decode_seq_s = _Number()
    decode_ctx_token_s = _Number()
    prefill_token_s = _Number()
    prefill_ctx_token_s = _Number()
    running = _Number()
    waiting = _Number()
    kv_usage = _Number()
    signal_age_s = _Number()

    def __init__(self, **columns: Ints | Floats) -> None:
        if columns.keys() != set(COLUMNS):
            wrong = ", ".join(sorted(columns.keys() ^ set(COLUMNS)))
            raise TypeError(f"a fleet view has each of its columns, and no others; missing or unknown: {wrong}")
        self.counts: Ints = np.array([columns[name] for name in COUNTS], dtype=np.int64)
        self.numbers: Floats = np.array([columns[name] for name in NUMBERS], dtype=np.float64)

    @classmethod
    def over(cls, counts: Ints, numbers: Floats) -> Self:
        """The view of these two tables, which it keeps."""
        view = cls.__new__(cls)
        view.counts, view.numbers = counts, numbers
        return view

    def __len__(self) -> int:
        replicas: int = self.counts.shape[1]
        return replicas

    def is_full(self, position: int) -> bool:
        """Whether the batch of this one is full."""
        return bool(self.counts.item(_IN_FLIGHT, position) >= self.counts.item(_MAX_BATCH, position))

    @property
    def room(self) -> Ints:
        """Calls that each can take before its batch is full, at least zero."""
        left: Ints = np.maximum(0, self.max_batch - self.in_flight)
        return left


class Terms(Mapping[str, Floats]):
    """What costs are made of, by name, without an array for each: rows of a table whose first row is the cost."""

    __slots__ = ("names", "table")

    def __init__(self, names: tuple[str, ...], table: Floats) -> None:
        self.names, self.table = names, table

    def __getitem__(self, name: str) -> Floats:
        if name not in self.names:
            raise KeyError(name)
        row: Floats = self.table[1 + self.names.index(name)]
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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
    terms_s: Mapping[str, Floats] = {}

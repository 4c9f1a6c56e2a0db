"""In which order an engine admits what waits, and whom it gives up first when its KV cache is full."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

OrderName = Literal["arrival", "priority", "uniboost"]

GAMMA_PER_TOKEN = 2e-3
BIN_TOKENS = 256


class Order(Protocol):
    """The lower key goes first; of equal keys the one that came first."""

    def key(self, *, priority: float, ready_s: float, served_tokens: int) -> float:
        """Of a request that entered the queue at `ready_s`; `served_tokens` are its prompt and what it has produced."""
        ...

    def guard_tokens(self, served_tokens: int) -> int:
        """How many `served_tokens` a request that is admitted with so many must have before it may be given up."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """First come, first served; the last to come is given up first. vLLM's `--scheduling-policy fcfs`."""

    def key(self, *, priority: float, ready_s: float, served_tokens: int) -> float:
        return 0.0

    def guard_tokens(self, served_tokens: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Priority:
    """The lower `Request.priority` goes first, then the earlier. vLLM's `--scheduling-policy priority`.

    Source: vllm/v1/core/sched/scheduler.py and request_queue.py. A request of a low value is admitted before those
    that wait, but never drives a running one out: that happens only when a decode finds no block, and then to the
    running request of the highest (priority, arrival), even if it is the one that needs the block.
    """

    def key(self, *, priority: float, ready_s: float, served_tokens: int) -> float:
        return priority

    def guard_tokens(self, served_tokens: int) -> int:
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UniBoost:
    """Arrival minus a boost that fades with service: "Beyond Prediction: Tail-Aware Scheduling", arXiv 2606.18431.

        key_s = ready_s - token_s * b(w),   b(w) = ln(1 / (1 - exp(-gamma w))) / gamma,   w = max(attained, prefill)

    `w` counts tokens: the prompt and what has been produced, at least one. `gamma_per_token` is 1 / tokens; towards
    infinity the order is by arrival, towards zero by least service. `token_s`, seconds of service that a token stands
    for, turns the boost from tokens into the unit of arrivals.

    MemGuard: a request that is admitted may not be given up until `w` leaves its bin [k 2^i, k 2^(i+1)), k = 256
    tokens (those below k are one bin), unless all running requests are guarded.

    Simpler than the paper: keys are computed when a request enters the queue and when someone must be given up, so
    nobody is driven out for the sake of the order while blocks last; gamma is fixed, where the paper follows the
    slope of the tail of what it has seen; `token_s` is ours.
    """

    gamma_per_token: float
    token_s: float

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma_per_token < math.inf:
            raise ValueError(f"gamma is {self.gamma_per_token} per token, expected a finite number above zero")

    def key(self, *, priority: float, ready_s: float, served_tokens: int) -> float:
        boost_tokens = -math.log(-math.expm1(-self.gamma_per_token * max(1, served_tokens))) / self.gamma_per_token
        return ready_s - self.token_s * boost_tokens

    def guard_tokens(self, served_tokens: int) -> int:
        return BIN_TOKENS << (served_tokens // BIN_TOKENS).bit_length()


def order_of(name: OrderName, *, gamma_per_token: float, token_s: float) -> Order:
    """The order of that name. Raises ValueError for a gamma that is not above zero."""
    match name:
        case "arrival":
            return Arrival()
        case "priority":
            return Priority()
        case "uniboost":
            return UniBoost(gamma_per_token=gamma_per_token, token_s=token_s)
        case _:
            assert_never(name)

"""The columns of a pool: one row for each thing that is known of a replica, what is so at a time, and one more call."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from swarmx.agents.compiled import compiled
from swarmx.core.fleet import COUNTS, NUMBERS, Floats, Ints

INTS = (*COUNTS, "slot")
FLOATS = (*NUMBERS, "measured_at_s", "read_at_s", "prefill_rate", "others", "usual_others")
"""`prefill_tokens` and `prefill_share` are as of `read_at_s`; `cached_tokens` and `signal_age_s` hold nothing."""
INT_ROW = {name: row for row, name in enumerate(INTS)}
FLOAT_ROW = {name: row for row, name in enumerate(FLOATS)}

PROMPTS_MEMORY_S = 15.0
FADES_PER_S = -1.0 / PROMPTS_MEMORY_S
NEWS = 0.2  # of the time of a call, until what was told of others is old: all who heard of a gap fill it

_SHOWN, _TOLD = len(COUNTS), len(NUMBERS)
_INT = np.dtype(np.int64)
_UNIT = 2.0**-53  # of 53 bits, in [0, 1)
_IN_FLIGHT, _LAST_CHOSEN, _MAX_BATCH = INT_ROW["in_flight"], INT_ROW["last_chosen"], INT_ROW["max_batch"]
_REMAINING, _VARIANCE, _WEIGHT = FLOAT_ROW["remaining_work"], FLOAT_ROW["work_variance"], FLOAT_ROW["weight"]
_CONTEXT, _SHARED, _UNREAD = FLOAT_ROW["context_tokens"], FLOAT_ROW["shared_tokens"], FLOAT_ROW["unread_tokens"]
_PREFILL, _RATE, _SHARE, _AGE = (
    FLOAT_ROW["prefill_tokens"],
    FLOAT_ROW["prefill_rate"],
    FLOAT_ROW["prefill_share"],
    FLOAT_ROW["signal_age_s"],
)
_MEASURED_AT, _READ_AT = FLOAT_ROW["measured_at_s"], FLOAT_ROW["read_at_s"]
_OTHERS, _USUAL = FLOAT_ROW["others"], FLOAT_ROW["usual_others"]
_CALL_BASE, _STEP_BASE, _SEQ = FLOAT_ROW["call_base_s"], FLOAT_ROW["step_base_s"], FLOAT_ROW["decode_seq_s"]
_CTX_TOKEN, _PREFILL_TOKEN = FLOAT_ROW["decode_ctx_token_s"], FLOAT_ROW["prefill_token_s"]


def _as_of(
    ints: Ints,
    floats: Floats,
    columns: Ints,
    now_s: float,
    dice: NDArray[np.uint64],
    typical_work: float,
    typical_context: float,
    typical_weight: float,
    counts: Ints,
    numbers: Floats,
) -> None:
    for row in range(_SHOWN):
        for i in range(len(columns)):
            counts[row, i] = ints[row, columns[i]]
    for row in range(_TOLD):
        for i in range(len(columns)):
            numbers[row, i] = floats[row, columns[i]]
    for i in range(len(columns)):
        since_s = now_s - floats[_READ_AT, columns[i]]
        numbers[_PREFILL, i] = max(0.0, numbers[_PREFILL, i] - since_s * floats[_RATE, columns[i]])
        numbers[_SHARE, i] *= math.exp(since_s * FADES_PER_S)
        numbers[_AGE, i] = now_s - floats[_MEASURED_AT, columns[i]]
    if len(dice) == 0:
        return
    for i in range(len(columns)):
        # Steele et al. 2014, Fast splittable pseudorandom number generators (SplitMix64)
        dice[0] += np.uint64(0x9E3779B97F4A7C15)
        bits = dice[0]
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        draw = ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * _UNIT
        told, usual = floats[_OTHERS, columns[i]], floats[_USUAL, columns[i]]
        fresh = 1.0
        if typical_work != 0.0:
            batch = min(counts[_IN_FLIGHT, i] + told + 1.0, float(counts[_MAX_BATCH, i]))
            context = numbers[_CONTEXT, i] + told * typical_context
            step_s = numbers[_STEP_BASE, i] + numbers[_SEQ, i] * batch + numbers[_CTX_TOKEN, i] * context
            stay_s = numbers[_CALL_BASE, i] + numbers[_PREFILL_TOKEN, i] * typical_context + typical_work * step_s
            age_s = numbers[_AGE, i]
            if age_s > 0.0:  # not where nothing was told yet: nothing is usual there either
                fresh = math.exp(-age_s / max(NEWS * stay_s, 1e-6))
        others = math.floor(usual + fresh * (told - usual) + draw)
        counts[_IN_FLIGHT, i] += int(others)
        numbers[_WEIGHT, i] += others * typical_weight
        numbers[_REMAINING, i] += others * typical_work / 2.0  # seen at a random time, half of it is done
        numbers[_CONTEXT, i] += others * typical_context


def _dispatched(
    ints: Ints,
    floats: Floats,
    column: int,
    decision: int,
    now_s: float,
    prompt: float,
    shared: float,
    work: float,
    variance: float,
    weight: float,
) -> bool:
    fresh, rate = prompt - shared, floats[_RATE, column]
    ints[_IN_FLIGHT, column] += 1
    ints[_LAST_CHOSEN, column] = decision
    floats[_REMAINING, column] += work
    floats[_VARIANCE, column] += variance
    floats[_WEIGHT, column] += weight
    floats[_CONTEXT, column] += prompt
    floats[_SHARED, column] += shared
    floats[_UNREAD, column] += fresh
    if rate > 0.0:
        since_s = now_s - floats[_READ_AT, column]
        floats[_PREFILL, column] = max(0.0, floats[_PREFILL, column] - since_s * rate) + fresh
        floats[_SHARE, column] *= math.exp(FADES_PER_S * since_s)
        floats[_SHARE, column] += fresh / rate / PROMPTS_MEMORY_S
        floats[_READ_AT, column] = now_s
    return bool(ints[_IN_FLIGHT, column] + floats[_OTHERS, column] == ints[_MAX_BATCH, column])


_TABLES = "int64[:, ::1], float64[:, ::1]"
_DICE = "uint64[::1], float64, float64, float64"


@lru_cache(maxsize=1)
def as_of() -> Callable[[Ints, Floats, Ints, float, NDArray[np.uint64], float, float, float, Ints, Floats], None]:
    """From a pool's integers and floats, fill the two tables of a `FleetView` of some columns at a time.

    With `dice`, the state of a random generator, calls of other routers are counted in, each with the work, the context
    and the weight of a typical call: as many whole ones as there should be by now. What was told of them fades towards
    the usual within a part of the time that a typical call takes. What is between two whole numbers is one of them by
    the dice, so that routers that heard the same do not all choose the same (cf. Dahlin 2000, Interpreting stale load
    information).
    """
    signature = f"void({_TABLES}, Array(int64, 1, 'A', readonly=True), float64, {_DICE}, {_TABLES})"
    first, dice = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.uint64)
    return compiled(_as_of, signature, *_of_one(), first, 0.0, dice, 1.0, 1.0, 1.0, *tables(1))


def tables(columns: int) -> tuple[Ints, Floats]:
    """The tables of a view of so many columns, to be filled."""
    return np.empty((_SHOWN, columns), _INT), np.empty((_TOLD, columns))


@lru_cache(maxsize=1)
def dispatched() -> Callable[[Ints, Floats, int, int, float, float, float, float, float, float], bool]:
    """Count one more call on a column, the number of its decision, the time, its prompt and what of it is in the cache,
    its work with the variance, and its weight; returns whether the batch of the replica is full just now."""
    signature = f"boolean({_TABLES}, int64, int64, {', '.join(['float64'] * 6)})"
    return compiled(_dispatched, signature, *_of_one(), 0, 1, 0.0, 1, *[1.0] * 4)


def _of_one() -> tuple[Ints, Floats]:
    """The tables of a pool with one column."""
    return np.ones((len(INTS), 1), dtype=np.int64), np.ones((len(FLOATS), 1))

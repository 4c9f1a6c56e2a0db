"""The arithmetic of `marginal`: one pass over the candidates for their times, one for what they cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from swarmx.agents.compiled import compiled
from swarmx.core.fleet import COUNTS, NUMBERS, Floats, Ints
from swarmx.core.forecast import LEVELS, masses_of

TERMS = ("wait_s", "prefill_s", "decode_s", "others_s", "spared_s")
"""What costs are made of."""

COST_S, WAIT_S, PREFILL_S, DECODE_S, OTHERS_S, SPARED_S, OWN_S, SLOWDOWN, FIRST = range(9)
TOLD = 9
"""The rows of what `weigh` fills: the cost, `TERMS`, own time, slowdown, and the calls that must end first."""

_IN_FLIGHT, _MAX_BATCH = map(COUNTS.index, ("in_flight", "max_batch"))
_REMAINING, _CONTEXT, _WEIGHT = map(NUMBERS.index, ("remaining_work", "context_tokens", "weight"))
_PREFILL, _SHARED, _CACHED = map(NUMBERS.index, ("prefill_tokens", "shared_tokens", "cached_tokens"))
_SHARE, _SLOWDOWN, _KV_CAPACITY = map(NUMBERS.index, ("prefill_share", "slowdown", "kv_capacity_tokens"))
_CALL_BASE, _STEP_BASE, _DECODE_SEQ = map(NUMBERS.index, ("call_base_s", "step_base_s", "decode_seq_s"))
_DECODE_CTX, _PREFILL_TOKEN = map(NUMBERS.index, ("decode_ctx_token_s", "prefill_token_s"))
_PREFILL_CTX = NUMBERS.index("prefill_ctx_token_s")

_MOST_SHARE = 0.8  # of a replica's time that prompts may take in the eyes of a policy
_MOST_TAIL = 8.0  # beyond it only the latest would count, and powers would overflow
_LEAST_LATE, _MOST_LATE = 0.1, 10.0
_MINUTE_S = 60.0
_CUBE = 3.0  # what a tail of 2 makes of times
_MOST_WEIGHT = 1e4  # and one over it the least, whatever targets clients bring
EQUAL = 1.0 + 1e-9  # costs this close are the same


def _weigh(
    counts: Ints,
    numbers: Floats,
    quantiles: Floats,
    masses: Floats,
    mean: float,
    prompt: float,
    ahead: float,
    age_s: float,
    remaining_s: float,
    target_s: float,
    usual_s: float,
    usual_call_s: float,
    others_end_s: float,
    externality: float,
    prefix: float,
    tail: float,
    relative: float,
    hold: float,
    kv: float,
    siblings: float,
    share: float,
    learn: float,
    told: Floats,
) -> tuple[int, int, float]:
    """The formula of `policies.marginal`, in its words.

    First come the two tables of the fleet view; what the work may come to, with its probability, [levels], or one
    value that is sure; then its mean, the prompt's tokens, the calls ahead, the workflow, and the ingredients.

    Fills `told`, [TOLD, replicas], with the cost, `TERMS`, own time, slowdown, and the calls that must end first, and
    returns where the cost is least, how many cost as much, and the weight of the call.
    """
    in_flight, max_batch = counts[_IN_FLIGHT], counts[_MAX_BATCH]
    remaining_work, context_tokens, weight = numbers[_REMAINING], numbers[_CONTEXT], numbers[_WEIGHT]
    prefill_tokens, shared_tokens, cached_tokens = numbers[_PREFILL], numbers[_SHARED], numbers[_CACHED]
    prefill_share, slowdown, kv_capacity_tokens = numbers[_SHARE], numbers[_SLOWDOWN], numbers[_KV_CAPACITY]
    call_base_s, step_base_s, decode_seq_s = numbers[_CALL_BASE], numbers[_STEP_BASE], numbers[_DECODE_SEQ]
    decode_ctx_token_s, prefill_token_s = numbers[_DECODE_CTX], numbers[_PREFILL_TOKEN]
    prefill_ctx_token_s = numbers[_PREFILL_CTX]
    prefix, share, learn = min(1.0, max(0.0, prefix)), min(1.0, max(0.0, share)), min(1.0, max(0.0, learn))
    power = 1.0 + min(_MOST_TAIL, max(0.0, tail))
    spared_s = siblings * others_end_s
    replicas = counts.shape[1]
    work = max(mean, 1e-9)
    least_s = np.inf
    for i in range(replicas):
        count = float(in_flight[i])
        some = max(count, 1.0)
        cached = min(cached_tokens[i], prompt) * prefix
        # Calls that must end before this one has a slot and, when all have grown by half of what they still need, room
        # in the KV cache. It waits for no more room than it takes itself, in whole calls: what others are short of is
        # not its to wait for, and one that takes less than half of what a call there will free does not wait at all.
        ends = max(0.0, count - max_batch[i] + 1.0)
        if kv:
            shared = min(shared_tokens[i], context_tokens[i])
            spare = remaining_work[i] * -0.5 - context_tokens[i] + kv_capacity_tokens[i]
            short = prompt + mean - cached - max(0.0, spare + shared)
            if short > 0.0:
                frees = max((context_tokens[i] - shared + remaining_work[i]) / some, 1.0)
                ends = max(ends, min(count, np.floor(short / frees + 0.5)))
        slower = slowdown[i] if learn == 1.0 else slowdown[i] ** learn
        # The attention of p tokens of which c are cached is that of (p^2 - c^2) / 2 pairs.
        read_s = (prompt - cached) * (prefill_token_s[i] + prefill_ctx_token_s[i] * ((prompt + cached) / 2.0)) * slower
        prefill_s = (prefill_token_s[i] * prefill_tokens[i] + call_base_s[i]) * slower + read_s
        # How many times longer than the profile says its steps take: slowdown, and prompts in between.
        pace = slower / (1.0 - min(prefill_share[i], _MOST_SHARE) * share) * work
        added_s = (decode_ctx_token_s[i] * (prompt + work / 2.0) + decode_seq_s[i]) * pace
        beside = min(count, max_batch[i] - 1.0)
        decode_s = decode_seq_s[i] * beside + step_base_s[i] + decode_ctx_token_s[i] * context_tokens[i]
        decode_s = decode_s * pace + added_s
        wait_s = 0.0
        if ends > 0.0:
            wait_s = (ends + ahead) * (remaining_work[i] / some * (decode_s / work) + slower * call_base_s[i]) / some
            if 0.0 < hold < 1.0:
                wait_s /= hold
        shares = some * work + remaining_work[i]
        told[WAIT_S, i] = wait_s
        told[PREFILL_S, i] = prefill_s
        told[DECODE_S, i] = decode_s
        told[OTHERS_S, i] = (added_s * remaining_work[i] / shares + read_s) * weight[i]
        told[OWN_S, i] = prefill_s + decode_s + wait_s
        told[SLOWDOWN, i] = slower
        told[FIRST, i] = ends
        least_s = min(least_s, told[OWN_S, i])
    # What remains of the workflow, with this call in the place of what such calls usually take.
    rest_s = remaining_s + (least_s - usual_call_s if usual_call_s > 0.0 else 0.0)
    whole_s = max(1e-9, age_s + max(least_s, rest_s))
    own_weight = 1.0
    if usual_s > 0.0:
        own_weight = min(_MOST_LATE, max(_LEAST_LATE, whole_s / usual_s)) ** (power - 1.0)
    if target_s > 0.0:
        own_weight *= (_MINUTE_S / target_s) ** relative
    own_weight = min(_MOST_WEIGHT, max(1.0 / _MOST_WEIGHT, own_weight))
    best = 0
    for i in range(replicas):
        others_s = told[OTHERS_S, i] * (externality / own_weight)
        unit_s = told[DECODE_S, i] / work
        grown = 0.0
        for k in range(len(quantiles)):
            mine_s = told[OWN_S, i] + (quantiles[k] - mean) * unit_s
            if spared_s > 0.0:
                mine_s = max(mine_s - spared_s, 0.1 * mine_s)
            part = (mine_s + (whole_s - least_s)) / whole_s
            grown += masses[k] * (part * part * part if power == _CUBE else part**power)
        felt_s = (grown - 1.0) * (whole_s / power) + least_s
        told[COST_S, i] = felt_s + others_s
        told[OTHERS_S, i] = others_s
        told[SPARED_S, i] = felt_s - told[OWN_S, i]
        if told[COST_S, i] < told[COST_S, best]:
            best = i
    equal = 0
    for i in range(replicas):
        equal += told[COST_S, i] <= told[COST_S, best] * EQUAL
    return best, equal, own_weight


@lru_cache(maxsize=1)
def weigh() -> Callable[..., tuple[int, int, float]]:
    """`_weigh` as machine code."""
    counts, numbers = np.ones((len(COUNTS), 1), dtype=np.int64), np.ones((len(NUMBERS), 1))
    masses = masses_of(LEVELS)
    told = np.empty((TOLD, 1))
    return compiled(_weigh, _SIGNATURE, counts, numbers, np.ones(len(masses)), masses, *[1.0] * 18, told)


_TABLE = "Array({}, 2, 'A', readonly=True)"
_LEVELS = "Array(float64, 1, 'A', readonly=True)"
_ARGUMENTS = [_TABLE.format("int64"), _TABLE.format("float64"), _LEVELS, _LEVELS, *["float64"] * 18, "float64[:, ::1]"]
_SIGNATURE = f"Tuple((int64, int64, float64))({', '.join(_ARGUMENTS)})"

"""marginal: the candidate on which the call costs least, what it does to others included."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Ints, Order, WorkflowView

# Beside a short array, one without dimensions takes half the time of a number.
_ONE = np.array(1.0)
_MINUS_HALF = np.array(-0.5)
_MOST_SHARE = np.array(0.8)  # of a replica's time that prompts may take in the eyes of a policy
_MOST_TAIL = 8.0  # beyond it only the latest would count, and powers would overflow
_LEAST_LATE, _MOST_LATE = 0.1, 10.0
_MINUTE_S = 60.0
_SURE = np.ones(1)  # all that may come of a sure value
_CUBE = 3.0  # what a tail of 2 makes of times
_ROOT_3 = math.sqrt(3.0)
_MOST_WEIGHT = 1e4  # and one over it the least, whatever targets clients bring


@dataclass(frozen=True, slots=True, kw_only=True)
class Marginal:
    """The candidate on which the call costs least: its own expected time, and the time that it takes from all others.

    With n calls there of which each still needs r, batch limit B, own work w, prompt p of which c is cached, and the
    constants of `core.engine`:

        step      = (step_base + decode_seq * min(n + 1, B) + decode_ctx_token * (context + p + w / 2))
                    / (1 - share), the share of the replica's time that went into prompts of late
        own       = slowdown * (wait + prefill of the backlog and of p - c + w * step)
        shared    = w * r / (w + r)              steps that it shares with each of them, if both are exponential
        each      = slowdown * (prefill of p - c
                    + shared * (decode_seq + decode_ctx_token * (p + w / 2)) / (1 - share))   what each of them loses
        whole     = age + remaining              of the workflow, with the least own on any candidate
        due       = max(own - siblings * (time until the last sibling ends), own / 10)
        felt      = least + whole / (1 + tail) * (E[((whole - least + due) / whole)^(1 + tail)] - 1)
        weight    = (whole / usual)^tail * (60 s / target)^relative      within [1e-4, 1e4], the first within [1/10, 10]
        cost      = felt + externality * each * (sum of the weights of the calls there) / weight

    `wait` is the time until a slot, and room in the KV cache, are free: completions that must come first, one every
    (r * step + call_base) / n, counting the calls that wait ahead. The call is held back when the cheapest replica has
    no room; calls wait in the order of slack.

    The weights make of the mean a tail: up to a factor that a kind has in common, (whole / usual)^tail is the gradient
    of (sum of T^(1 + tail))^(1 / (1 + tail)) over its workflows, which take T each; 1 where `usual` is not known.
    With `risk`, the expectation in `felt` is over the quantiles of the forecast: what may be long costs more than its
    mean says where a unit of work takes long, and a branch may turn out to be the last of its siblings. `felt` is own
    itself for a forecast without spread and a call without siblings on the candidate that takes least, and changes
    like own there.
    With `relative` = 1 a second is worth what it is of the workflow's target. `remaining` is what usually remains at
    this stage, with the least that the call itself takes, wherever it goes, in the place of what such calls usually
    take, and no less than that least.

    Of a call whose siblings take longer, `siblings` of the time until the last of them ends is free, but no more than
    nine tenths of its own time. What risk and siblings make of own time is the term `spared`, above zero for a risk.

    Every ingredient is off at 0: `externality`, `prefix`, `slack` (the order), `tail` (8 at most), `relative`, `risk`,
    `hold`, `kv`, `siblings`, `share` (prompts that interrupt), `learn` (from how long calls took). With `hold` between
    0 and 1, `wait` is counted as 1 / hold times as long: whoever waits may be overtaken, and keeps others waiting.
    """

    name: ClassVar[str] = "marginal"

    externality: float = 1.0
    prefix: float = 1.0
    slack: float = 1.0
    tail: float = 2.0
    relative: float = 1.0
    risk: float = 1.0
    hold: float = 1.0
    kv: float = 1.0
    siblings: float = 1.0
    share: float = 1.0
    learn: float = 1.0

    @property
    def order(self) -> Order:
        return "slack" if self.slack else "arrival"

    @property
    def _tail(self) -> float:
        """No more than is finite in all that follows."""
        return min(_MOST_TAIL, max(0.0, self.tail))

    @property
    def waits(self) -> bool:
        return bool(self.hold)

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        # Most of the time here is the start of operations on short arrays: there are as few as can be, they write into
        # arrays of their own where they may, and numbers are multiplied with each other first.
        work = max(call.forecast.mean, 1e-9)
        prompt = float(call.call.prompt_tokens)
        cached, prompt_s = self._prompt(prompt, fleet)
        count = fleet.in_flight.astype(np.float64)
        some = np.maximum(count, _ONE)
        first = self._must_end_first(call, fleet, some, cached)
        slow = fleet.slowdown if self.learn >= 1.0 else fleet.slowdown ** _within_one(self.learn)
        prompt_s *= slow
        prefill_s = fleet.prefill_token_s * fleet.prefill_tokens
        prefill_s += fleet.call_base_s
        prefill_s *= slow
        prefill_s += prompt_s
        pace = self._pace(slow, fleet)
        pace *= work
        added_s = fleet.decode_ctx_token_s * (prompt + work / 2.0)
        added_s += fleet.decode_seq_s
        added_s *= pace
        decode_s = fleet.decode_seq_s * (count if first is None else np.minimum(count, fleet.max_batch - 1))
        decode_s += fleet.step_base_s
        decode_s += fleet.decode_ctx_token_s * fleet.context_tokens
        decode_s *= pace
        decode_s += added_s
        own_s = prefill_s + decode_s
        if first is None:
            wait_s = np.zeros(len(count))
        else:
            unit_s = decode_s / work
            soon_s = (first + call.ahead) * (fleet.remaining_work / some * unit_s + slow * fleet.call_base_s) / some
            if 0.0 < self.hold < 1.0:
                soon_s /= self.hold
            wait_s = np.where(first <= 0.0, 0.0, soon_s)
            own_s += wait_s
        least_s = _least(own_s)
        whole_s = max(1e-9, call.workflow.age_s + max(least_s, self._rest_s(call.workflow, least_s)))
        weight = self._weight(call.workflow, whole_s)
        some *= work
        some += fleet.remaining_work
        added_s *= fleet.remaining_work
        added_s /= some
        added_s += prompt_s
        added_s *= fleet.weight
        others_s = added_s * (self.externality / weight)
        felt_s = self._felt(call, own_s, decode_s, work, whole_s, least_s)
        cost_s = felt_s + others_s
        index = int(cost_s.argmin())
        cheapest = cost_s <= cost_s.item(index) * (1.0 + 1e-9)
        if np.count_nonzero(cheapest) > 1:
            index = int(cheapest.nonzero()[0][rng.integers(np.count_nonzero(cheapest))])
        expected_s, slowdown = own_s.item(index), slow.item(index) or 1.0
        felt_s -= own_s
        return Choice(
            index=index,
            hold=bool(self.hold) and first is not None and first.item(index) > 0.0,
            urgency=round(call.now_s + call.workflow.slack_s, 3),  # milliseconds: the order of sums must not show
            expected_s=expected_s,
            profile_s=expected_s / slowdown,
            unit_s=decode_s.item(index) / work / slowdown,
            weight=weight,
            cost_s=cost_s,
            terms_s={
                "wait_s": wait_s,
                "prefill_s": prefill_s,
                "decode_s": decode_s,
                "others_s": others_s,
                "spared_s": felt_s,
            },
        )

    def _prompt(self, prompt: float, fleet: FleetView) -> tuple[Floats, Floats]:
        """Tokens of the prompt that are cached, and seconds to read the others, each [replicas]."""
        if _most(fleet.cached_tokens) <= 0.0:
            return fleet.cached_tokens, prompt * (fleet.prefill_token_s + fleet.prefill_ctx_token_s * (prompt / 2.0))
        cached = np.minimum(fleet.cached_tokens, prompt)
        if self.prefix < 1.0:
            cached *= _within_one(self.prefix)
        # The attention of p tokens of which c are cached is that of (p^2 - c^2) / 2 pairs.
        each_s = fleet.prefill_token_s + fleet.prefill_ctx_token_s * ((prompt + cached) / 2.0)
        return cached, (prompt - cached) * each_s

    def _must_end_first(self, call: CallView, fleet: FleetView, some: Floats, cached: Floats) -> Floats | None:
        """Calls that must end before this one has a slot and, when all have grown by half of what they still need,
        room in the KV cache, [replicas]; None for none anywhere. `some` are the calls there, one at least.

        A call waits for no more room than it takes itself, in whole calls: what others are short of is not its to wait
        for, and one that takes less than half of what a call there will free does not wait at all.
        """
        over = fleet.in_flight - fleet.max_batch
        slots = np.maximum(0.0, over + 1.0) if _most(over) >= 0 else None
        if not self.kv:
            return slots
        own = call.call.prompt_tokens + call.forecast.mean
        spare = fleet.remaining_work * _MINUS_HALF
        spare -= fleet.context_tokens
        spare += fleet.kv_capacity_tokens
        if _least(spare) >= own:  # whatever they share
            return slots
        shared = np.minimum(fleet.shared_tokens, fleet.context_tokens)
        takes = own - cached
        short = takes - np.maximum(0.0, spare + shared)
        if _most(short) <= 0.0:
            return slots
        frees = np.maximum((fleet.context_tokens - shared + fleet.remaining_work) / some, _ONE)
        room: Floats = np.minimum(fleet.in_flight, np.floor(np.maximum(0.0, short) / frees + 0.5))
        if _most(room) <= 0.0:
            return slots
        return room if slots is None else np.maximum(slots, room)

    def _pace(self, slow: Floats, fleet: FleetView) -> Floats:
        """How many times longer than the profile says a step takes, [replicas]: slowdown, and prompts in between."""
        busy = np.minimum(fleet.prefill_share, _MOST_SHARE)
        if self.share < 1.0:
            busy *= _within_one(self.share)
        np.subtract(_ONE, busy, out=busy)
        longer: Floats = np.divide(slow, busy, out=busy)
        return longer

    def _felt(
        self, call: CallView, own_s: Floats, decode_s: Floats, work: float, whole_s: float, least_s: float
    ) -> Floats:
        """Own time as the workflow feels it, [replicas]: with the risk that the call is long, without what siblings
        spare. A candidate that takes `least_s`, for sure and without siblings, is felt as that."""
        forecast, power = call.forecast, 1.0 + self._tail
        spared_s = self.siblings * call.workflow.others_s
        if power == _CUBE and not spared_s:  # the mean of a cube takes three moments and no quantiles
            deviation, skewness = forecast.shape if self.risk else (0.0, 0.0)
            # Cubes of times in this unit are the times that are felt.
            unit = math.cbrt(whole_s / _CUBE) / whole_s
            grown = own_s * unit
            grown += (whole_s - least_s) * unit
            felt_s = grown * grown
            felt_s *= grown
            if deviation:
                apart = decode_s * (deviation * _ROOT_3 * unit / work)
                grown += apart * (skewness / (_CUBE * _ROOT_3))
                apart *= apart
                apart *= grown
                felt_s += apart
            felt_s += least_s - whole_s / _CUBE
            return felt_s
        if self.risk and forecast.quantiles[-1] > forecast.quantiles[0]:
            longer, masses = forecast.spread
            mine_s = own_s + longer[:, None] * (decode_s / work)
        else:
            mine_s, masses = own_s[None, :], _SURE
        if spared_s:
            mine_s = np.maximum(mine_s - spared_s, 0.1 * mine_s)
        grown = (mine_s + (whole_s - least_s)) / whole_s
        grown = grown * grown * grown if power == _CUBE else grown**power  # a general power takes ten times as long
        felt_s = (masses @ grown - 1.0) * (whole_s / power) + least_s
        return felt_s

    def _rest_s(self, workflow: WorkflowView, own_s: float) -> float:
        """What remains of the workflow when this call takes `own_s`, where such calls usually take another time."""
        return workflow.remaining_s + (own_s - workflow.usual_call_s if workflow.usual_call_s > 0.0 else 0.0)

    def _weight(self, workflow: WorkflowView, whole_s: float) -> float:
        """What a second of a call is worth whose workflow will take so long in all."""
        weight = 1.0
        if workflow.usual_s > 0.0:
            weight = min(_MOST_LATE, max(_LEAST_LATE, whole_s / workflow.usual_s)) ** self._tail
        if workflow.target_s > 0.0:
            weight *= (_MINUTE_S / workflow.target_s) ** self.relative
        return min(_MOST_WEIGHT, max(1.0 / _MOST_WEIGHT, weight))


def _within_one(value: float) -> float:
    """An ingredient is there in part at most once."""
    return min(1.0, max(0.0, value))


def _least(values: Floats) -> float:
    """Where it is, is found much sooner than what it is."""
    return values.item(values.argmin())


def _most(values: Floats | Ints) -> float:
    return values.item(values.argmax())

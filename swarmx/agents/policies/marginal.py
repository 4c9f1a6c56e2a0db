"""marginal: the candidate on which the call costs least, what it does to others included."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.core.fleet import CallView, Choice, FleetView, Floats, Order, WorkflowView

_MOST_SHARE = 0.8  # of a replica's time that prompts may take in the eyes of a policy
_MOST_TAIL = 8.0  # beyond it only the latest would count, and powers would overflow
_LEAST_LATE, _MOST_LATE = 0.1, 10.0
_MINUTE_S = 60.0
_ONE = np.ones(1)
_CUBE = 3.0  # what a tail of 2 makes of times
_MOST_WEIGHT = 1e4  # and one over it the least, whatever targets clients bring


@dataclass(frozen=True, slots=True, kw_only=True)
class Marginal:
    """The candidate on which the call costs least: its own expected time, and the time that it takes from all others.

    With n calls there of which each still needs r, batch limit B, own work w, prompt p of which c is cached, and the
    constants of `core.engine`:

        step      = (step_base + decode_seq * min(n + 1, B) + decode_ctx_token * (context + p + w / 2))
                    / (1 - share), the share of the replica's time that went into prompts of late
        own       = slowdown * (wait + prefill of the backlog and of p - c + w * step)
        overlap   = n * w * r / (w + r)          steps that the call shares with them, if both are exponential
        others    = slowdown * (n * prefill of p - c
                    + overlap * (decode_seq + decode_ctx_token * (p + w / 2)) / (1 - share))
        whole     = age + remaining              of the workflow, with the least own on any candidate
        due       = max(own - siblings * (time until the last sibling ends), own / 10)
        felt      = least + whole / (1 + tail) * (E[((whole - least + due) / whole)^(1 + tail)] - 1)
        weight    = (whole / usual)^tail * (60 s / target)^relative      within [1e-4, 1e4], the first within [1/10, 10]
        cost      = felt + externality * others * (mean weight of the calls there) / weight

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
    `hold`, `kv`, `siblings`, `share` (prompts that interrupt), `learn` (from how long calls took).
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
        # Most of the time here is the start of operations on short arrays: those that change nothing are left out.
        work = max(call.forecast.mean, 1e-9)
        prompt = float(call.call.prompt_tokens)
        cached, prompt_s = self._prompt(prompt, fleet)
        count = fleet.in_flight.astype(np.float64)
        own_context = prompt + work / 2.0
        slow = fleet.slowdown if self.learn >= 1.0 else fleet.slowdown ** _within_one(self.learn)
        busy = np.minimum(fleet.prefill_share, _MOST_SHARE)
        stretch = 1.0 / (1.0 - (busy if self.share >= 1.0 else _within_one(self.share) * busy))
        after = count + 1.0
        step_s = stretch * (
            fleet.step_base_s
            + fleet.decode_seq_s * np.minimum(after, fleet.max_batch)
            + fleet.decode_ctx_token_s * (fleet.context_tokens + own_context)
        )
        some = np.maximum(count, 1.0)
        left = fleet.remaining_work / some
        unit_s = slow * step_s
        prefill_s = fleet.call_base_s + fleet.prefill_token_s * fleet.prefill_tokens + prompt_s
        first = self._must_end_first(call, fleet, after, left, cached)
        if first is None:
            wait_s = np.zeros(len(count))
            profile_s = prefill_s + work * step_s
        else:
            soon_s = (first + call.ahead) * (left * step_s + fleet.call_base_s) / some
            wait_s = np.where(first <= 0.0, 0.0, soon_s)
            profile_s = wait_s + prefill_s + work * step_s
        own_s = slow * profile_s
        overlap = count * work * left / (work + left)
        slower_s = stretch * (fleet.decode_seq_s + fleet.decode_ctx_token_s * own_context)
        others_s = slow * (count * prompt_s + overlap * slower_s)
        least_s = float(own_s.min())
        whole_s = max(1e-9, call.workflow.age_s + max(least_s, self._rest_s(call.workflow, least_s)))
        weight = self._weight(call.workflow, whole_s)
        charged_s = others_s * fleet.weight / some * (self.externality / weight)
        felt_s = self._felt(call, own_s, unit_s, whole_s, least_s)
        cost_s = felt_s + charged_s
        cheapest = (cost_s <= cost_s.min() * (1.0 + 1e-9)).nonzero()[0]
        index = int(cheapest[0] if len(cheapest) == 1 else cheapest[rng.integers(len(cheapest))])
        return Choice(
            index=index,
            hold=bool(self.hold) and first is not None and bool(first[index] > 0.0),
            urgency=round(call.now_s + call.workflow.slack_s, 3),  # milliseconds: the order of sums must not show
            expected_s=float(own_s[index]),
            profile_s=float(profile_s[index]),
            unit_s=float(step_s[index]),
            weight=weight,
            cost_s=cost_s,
            terms_s={
                "wait_s": wait_s if first is None else slow * wait_s,
                "prefill_s": slow * prefill_s,
                "decode_s": work * unit_s,
                "others_s": charged_s,
                "spared_s": felt_s - own_s,
            },
        )

    def _prompt(self, prompt: float, fleet: FleetView) -> tuple[Floats, Floats]:
        """Tokens of the prompt that are cached, and seconds to read the others, each [replicas]."""
        cached = np.minimum(fleet.cached_tokens, prompt)
        if self.prefix < 1.0:
            cached *= _within_one(self.prefix)
        # The attention of p tokens of which c are cached is that of (p^2 - c^2) / 2 pairs.
        each_s = fleet.prefill_token_s + fleet.prefill_ctx_token_s * ((prompt + cached) / 2.0)
        return cached, (prompt - cached) * each_s

    def _must_end_first(
        self, call: CallView, fleet: FleetView, after: Floats, left: Floats, cached: Floats
    ) -> Floats | None:
        """Calls that must end before this one has a slot and, when all have grown by half of what they still need,
        room in the KV cache, [replicas]; None for none anywhere. `after` are the calls there with this one."""
        excess = after - fleet.max_batch
        full = bool(excess.max() > 0.0)
        if not self.kv:
            return np.maximum(0.0, excess) if full else None
        held = np.maximum(0.0, fleet.context_tokens - fleet.shared_tokens)
        own = call.call.prompt_tokens + call.forecast.mean
        short = held + fleet.remaining_work / 2.0 - cached + own - fleet.kv_capacity_tokens
        if short.max() <= 0.0:
            return np.maximum(0.0, excess) if full else None
        count = after - 1.0
        frees = np.maximum(held / np.maximum(count, 1.0) + left, 1.0)
        return np.maximum(np.maximum(0.0, excess), np.minimum(count, np.maximum(0.0, short) / frees))

    def _felt(self, call: CallView, own_s: Floats, unit_s: Floats, whole_s: float, least_s: float) -> Floats:
        """Own time as the workflow feels it, [replicas]: with the risk that the call is long, without what siblings
        spare. A candidate that takes `least_s`, for sure and without siblings, is felt as that."""
        forecast, power = call.forecast, 1.0 + self._tail
        if self.risk and forecast.quantiles[-1] > forecast.quantiles[0]:
            longer, masses = forecast.spread
            mine_s = own_s + longer[:, None] * unit_s
        else:
            mine_s, masses = own_s[None, :], _ONE
        if spared_s := self.siblings * call.workflow.others_s:
            mine_s = np.maximum(mine_s - spared_s, 0.1 * mine_s)
        grown = (mine_s + (whole_s - least_s)) / whole_s
        grown = grown * grown * grown if power == _CUBE else grown**power  # a general power takes ten times as long
        felt_s: Floats = (masses @ grown - 1.0) * (whole_s / power) + least_s
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

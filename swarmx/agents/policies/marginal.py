"""marginal: the candidate on which the call costs least, what it does to others included."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from swarmx.agents.policies.marginal_cost import DECODE_S, EQUAL, FIRST, OWN_S, SLOWDOWN, TERMS, TOLD, weigh
from swarmx.core.fleet import CallView, Choice, FleetView, Order, Terms
from swarmx.core.forecast import masses_of

_SURE = np.ones(1)  # all that may come of a sure value


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
    def waits(self) -> bool:
        return bool(self.hold)

    def __post_init__(self) -> None:
        weigh()

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        forecast, workflow, work = call.forecast, call.workflow, max(call.forecast.mean, 1e-9)
        told = np.empty((TOLD, len(fleet)))
        index, equal, weight = weigh()(
            fleet.counts,
            fleet.numbers,
            np.array(forecast.quantiles if self.risk else (forecast.mean,), dtype=np.float64),
            masses_of(forecast.levels) if self.risk else _SURE,
            forecast.mean,
            call.call.prompt_tokens,
            call.ahead,
            workflow.age_s,
            workflow.remaining_s,
            workflow.target_s,
            workflow.usual_s,
            workflow.usual_call_s,
            workflow.others_s,
            self.externality,
            self.prefix,
            self.tail,
            self.relative,
            self.hold,
            self.kv,
            self.siblings,
            self.share,
            self.learn,
            told,
        )
        cost_s = told[0]
        if equal > 1:
            cheapest = (cost_s <= cost_s.item(index) * EQUAL).nonzero()[0]
            index = int(cheapest[rng.integers(equal)])
        expected_s, slowdown = told.item(OWN_S, index), told.item(SLOWDOWN, index) or 1.0
        return Choice(
            index=index,
            hold=bool(self.hold) and told.item(FIRST, index) > 0.0,
            urgency=round(call.now_s + workflow.slack_s, 3),  # milliseconds: the order of sums must not show
            expected_s=expected_s,
            profile_s=expected_s / slowdown,
            unit_s=told.item(DECODE_S, index) / work / slowdown,
            weight=weight,
            cost_s=cost_s,
            terms_s=Terms(TERMS, told[: 1 + len(TERMS)]),
        )

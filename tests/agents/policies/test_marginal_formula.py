"""marginal against its own formula, written down as it reads in its docstring."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.agents.policies.marginal import Marginal
from swarmx.core.fleet import CallView, FleetView
from swarmx.core.forecast import LEVELS, Forecast, masses_of
from tests.contract.test_policies import WORKFLOW, a_call_view, a_fleet

TERMS = ("wait_s", "prefill_s", "decode_s", "others_s", "spared_s")


def written_down(policy: Marginal, call: CallView, fleet: FleetView) -> list[dict[str, float]]:
    """Terms and cost of each candidate, one number at a time."""
    work, prompt, flow = max(call.forecast.mean, 1e-9), float(call.call.prompt_tokens), call.workflow
    anywhere_full = bool((fleet.in_flight >= fleet.max_batch).any())
    rows: list[dict[str, float]] = []
    for i in range(len(fleet)):
        n, most, rest = int(fleet.in_flight[i]), int(fleet.max_batch[i]), float(fleet.remaining_work[i])
        slow = float(fleet.slowdown[i]) ** policy.learn
        pace = slow / (1.0 - policy.share * min(0.8, float(fleet.prefill_share[i])))
        seq, ctx, context = (
            float(column[i]) for column in (fleet.decode_seq_s, fleet.decode_ctx_token_s, fleet.context_tokens)
        )
        cached = policy.prefix * min(prompt, float(fleet.cached_tokens[i]))
        read_s = (prompt - cached) * fleet.prefill_token_s[i]
        read_s += (prompt**2 - cached**2) / 2.0 * fleet.prefill_ctx_token_s[i]
        each = rest / max(n, 1)
        room = 0.0
        if policy.kv:
            shared = min(float(fleet.shared_tokens[i]), context)
            spare = float(fleet.kv_capacity_tokens[i]) - context - rest / 2.0
            short = prompt + call.forecast.mean - cached - max(0.0, spare + shared)
            if spare < prompt + call.forecast.mean:
                frees = max(1.0, (context - shared) / max(n, 1) + each)
                room = min(n, math.floor(max(0.0, short) / frees + 0.5))
        rows.append(
            {
                "first": max(room, n - most + 1.0, 0.0),
                "n": n, "each": each, "slow": slow, "pace": pace, "read": slow * read_s,
                "added": pace * (seq + ctx * (prompt + work / 2.0)),
                "base": float(fleet.call_base_s[i]) * slow,
                "backlog": slow * float(fleet.prefill_token_s[i] * fleet.prefill_tokens[i]),
                "held": pace * (float(fleet.step_base_s[i]) + ctx * context),
                "seq": pace * seq, "most": most,
            }
        )  # fmt: skip
    waits = anywhere_full or any(row["first"] > 0.0 for row in rows)
    for row in rows:
        beside = min(row["n"], row["most"] - 1) if waits else row["n"]
        row["step"] = row["held"] + row["seq"] * beside + row["added"]
        ahead = (row["first"] + call.ahead) * (row["each"] * row["step"] + row["base"]) / max(row["n"], 1)
        row["wait_s"] = ahead / (policy.hold if 0.0 < policy.hold < 1.0 else 1.0) if row["first"] > 0.0 else 0.0
        row["prefill_s"] = row["base"] + row["backlog"] + row["read"]
        row["decode_s"] = work * row["step"]
        row["own"] = row["wait_s"] + row["prefill_s"] + row["decode_s"]
    least = min(row["own"] for row in rows)
    remaining = flow.remaining_s + (least - flow.usual_call_s if flow.usual_call_s > 0.0 else 0.0)
    whole = max(1e-9, flow.age_s + max(least, remaining))
    late = min(10.0, max(0.1, whole / flow.usual_s)) ** policy.tail if flow.usual_s > 0.0 else 1.0
    weight = min(1e4, max(1e-4, late * (60.0 / flow.target_s) ** policy.relative))
    spread = zip(call.forecast.quantiles, masses_of(call.forecast.levels).tolist(), strict=True)
    lengths = list(spread) if policy.risk else [(work, 1.0)]
    for row, heavy in zip(rows, fleet.weight.tolist(), strict=True):
        felt = 0.0
        for length, mass in lengths:
            own = row["own"] + (length - work) * row["step"]
            due = max(own - policy.siblings * flow.others_s, own / 10.0) if flow.others_s else own
            felt += mass * ((whole - least + due) / whole) ** (1.0 + policy.tail)
        felt = least + whole / (1.0 + policy.tail) * (felt - 1.0)
        loses = row["read"] + work * row["each"] / (work + row["each"]) * row["added"]
        row["others_s"] = policy.externality * loses * heavy / weight
        row["spared_s"] = felt - row["own"]
        row["cost"] = felt + row["others_s"]
    return rows


@st.composite
def loaded_fleets(draw: st.DrawFn) -> FleetView:
    """Batching engines at any load, some of them full, some short of KV cache, with prompts in their caches or not."""
    replicas = draw(st.integers(1, 6))

    def column(least: float, most: float) -> list[float]:
        return draw(st.lists(st.floats(least, most), min_size=replicas, max_size=replicas))

    in_flight = draw(st.lists(st.integers(0, 40), min_size=replicas, max_size=replicas))
    return a_fleet(
        replicas,
        in_flight=in_flight,
        max_batch=draw(st.sampled_from([32, 256])),
        remaining_work=[n * each for n, each in zip(in_flight, column(1.0, 900.0), strict=True)],
        weight=[n * each for n, each in zip(in_flight, column(0.01, 90.0), strict=True)],
        context_tokens=[n * each for n, each in zip(in_flight, column(10.0, 4000.0), strict=True)],
        shared_tokens=column(0.0, 5000.0),
        cached_tokens=draw(st.just([0.0] * replicas) | st.just(column(0.0, 9000.0))),
        prefill_tokens=column(0.0, 9000.0),
        prefill_share=column(0.0, 1.0),
        slowdown=column(0.5, 3.0),
        kv_capacity_tokens=draw(st.sampled_from([20_000.0, 60_000.0, 1e6])),
        call_base_s=column(0.0, 0.05),
        step_base_s=column(0.001, 0.05),
        decode_seq_s=column(1e-6, 1e-3),
        decode_ctx_token_s=column(1e-9, 1e-6),
        prefill_token_s=column(1e-6, 1e-3),
        prefill_ctx_token_s=column(0.0, 1e-8),
    )


@st.composite
def any_calls(draw: st.DrawFn) -> CallView:
    quantiles = tuple(sorted(draw(st.lists(st.floats(1.0, 5000.0), min_size=8, max_size=8))))
    forecast = Forecast(levels=LEVELS, quantiles=quantiles, unit="tokens", source="prior")
    times = st.sampled_from([0.0]) | st.floats(0.1, 300.0)
    workflow = replace(
        WORKFLOW,
        age_s=draw(times),
        remaining_s=draw(times),
        others_s=draw(times),
        usual_s=draw(times),
        usual_call_s=draw(times),
        target_s=draw(st.floats(1.0, 600.0)),
    )
    call = a_call_view(forecast, prompt_tokens=draw(st.integers(0, 9000)))
    return replace(call, workflow=workflow, ahead=draw(st.integers(0, 5)))


@settings(max_examples=300, deadline=None)
@given(
    call=any_calls(),
    fleet=loaded_fleets(),
    off=st.sets(st.sampled_from([field.name for field in dataclasses.fields(Marginal)])),
    tail=st.sampled_from([2.0, 2.0, 1.0, 3.5]),
    there=st.sampled_from([0.0, 0.0, 0.5]),
)
def test_every_cost_and_every_term_of_it_is_what_the_formula_says(
    call: CallView, fleet: FleetView, off: set[str], tail: float, there: float
) -> None:
    policy = dataclasses.replace(Marginal(tail=tail), **dict.fromkeys(off, there))
    choice, rows = policy.choose(call, fleet, np.random.default_rng(0)), written_down(policy, call, fleet)
    assert choice.cost_s is not None
    scale = [1e-9 * (abs(row["cost"]) + row["own"] + call.workflow.age_s + call.workflow.remaining_s) for row in rows]
    for i, row in enumerate(rows):
        assert choice.cost_s[i] == pytest.approx(row["cost"], rel=1e-9, abs=scale[i])
        for term in TERMS:
            assert choice.terms_s[term][i] == pytest.approx(row[term], rel=1e-9, abs=scale[i]), term
    assert choice.cost_s[choice.index] <= min(choice.cost_s) + 1e-9 * abs(min(choice.cost_s))
    assert choice.expected_s == pytest.approx(rows[choice.index]["own"])

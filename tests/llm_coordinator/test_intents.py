"""Operators' sentences: what is understood, what is asked back, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.core.control import ControlView, ToolCall
from swarmx.llm_coordinator.grammar import parse
from swarmx.llm_coordinator.intents import (
    Ask,
    Decide,
    HowIsTheModel,
    Intent,
    Order,
    Unclear,
    Unknown,
    WhatChanged,
    WhoScaled,
    WhyCall,
    WhySlow,
    examples,
)
from swarmx.llm_coordinator.phrases import resolve, span_words
from tests.llm_coordinator.views import CATALOGUE, a_model, a_proposal, a_view

CODER, QWEN = "qwen2.5-coder-0.5b", "qwen3-8b"
VIEW = a_view(a_model(CODER), a_model(QWEN), a_model("sdxl", min_replicas=None, max_replicas=None, limit=None))


def understood(text: str, view: ControlView = VIEW) -> Intent:
    return parse(text, view, CATALOGUE.policies)


def order(tool: str, **arguments: Any) -> Order:
    return Order(call=ToolCall(tool=tool, arguments=arguments))


@pytest.mark.parametrize(
    ("text", "intent"),
    [
        ("why is coder slow?", WhySlow(model=CODER)),
        ("Why is the coder model so slow today??", WhySlow(model=CODER)),
        ("please tell me why coder is slow", WhySlow(model=CODER)),
        ("why is coder taking so long", WhySlow(model=CODER)),
        ("what's wrong with qwen3", WhySlow(model=QWEN)),
        ("is sdxl overloaded?", WhySlow(model="sdxl")),
        ("why is everything slow?", WhySlow(model=None)),
        ("why did call call_0a1b go to qwen3-8b-1?", WhyCall(call_id="call_0a1b", replica_id="qwen3-8b-1")),
        ("why did call X go to replica Y?", WhyCall(call_id="X", replica_id="Y")),
        ("why was call_0a1b sent to qwen3-8b-0", WhyCall(call_id="call_0a1b", replica_id="qwen3-8b-0")),
        ("why call_0a1b", WhyCall(call_id="call_0a1b", replica_id=None)),
        ("where did call call_0a1b go?", WhyCall(call_id="call_0a1b", replica_id=None)),
        ("what changed in the last ten minutes?", WhatChanged(window_s=600.0)),
        ("what has changed in the last 2 hours", WhatChanged(window_s=7200.0)),
        ("what happened in the past half an hour", WhatChanged(window_s=1800.0)),
        ("changes in the last 90s", WhatChanged(window_s=90.0)),
        ("what changed", WhatChanged(window_s=600.0)),
        ("what changed today", WhatChanged(window_s=86_400.0)),
        ("what changed in the last 1000000 days", WhatChanged(window_s=30 * 86_400.0)),
        ("who scaled coder?", WhoScaled(model=CODER)),
        ("what scaled sdxl up", WhoScaled(model="sdxl")),
        ("why was qwen3 scaled down?", WhoScaled(model=QWEN)),
        ("status of coder", HowIsTheModel(model=CODER)),
        ("how is qwen3 doing", HowIsTheModel(model=QWEN)),
        ("how many replicas does coder have?", HowIsTheModel(model=CODER)),
        ("status", Ask(about="cluster")),
        ("how is the cluster", Ask(about="cluster")),
        ("How are the queues?", Ask(about="cluster")),
        ("is everything ok?", Ask(about="cluster")),
        ("what is running right now?", Ask(about="running")),
        ("which workflows are running", Ask(about="running")),
        ("show proposals", Ask(about="proposals")),
        ("are there any open proposals?", Ask(about="proposals")),
        ("what is waiting for approval?", Ask(about="proposals")),
        ("is the audit intact?", Ask(about="audit")),
        ("verify the audit log", Ask(about="audit")),
        ("help", Ask(about="help")),
    ],
)
def test_a_question_is_understood(text: str, intent: Intent) -> None:
    assert understood(text) == intent


@pytest.mark.parametrize(
    ("text", "intent"),
    [
        ("scale coder to 3", order("scale_model", model=CODER, replicas=3)),
        ("Could you scale up the coder to three replicas, please?", order("scale_model", model=CODER, replicas=3)),
        ("set coder to 2", order("scale_model", model=CODER, replicas=2)),
        ("give qwen3 4 replicas", order("scale_model", model=QWEN, replicas=4)),
        ("scale up coder", order("scale_model", model=CODER, replicas=3)),
        ("scale coder down by two", order("scale_model", model=CODER, replicas=0)),
        ("add 2 replicas to coder", order("scale_model", model=CODER, replicas=4)),
        ("remove a replica from qwen3", order("scale_model", model=QWEN, replicas=1)),
        ("scale coder to -1", order("scale_model", model=CODER, replicas=-1)),
        ("set bounds of coder to 1..4", order("set_replica_bounds", model=CODER, min_replicas=1, max_replicas=4)),
        ("set the limits for coder between 1 and 4",
         order("set_replica_bounds", model=CODER, min_replicas=1, max_replicas=4)),
        ("set coder min 0 max 4", order("set_replica_bounds", model=CODER, min_replicas=0, max_replicas=4)),
        ("keep qwen3 between one and six replicas",
         order("set_replica_bounds", model=QWEN, min_replicas=1, max_replicas=6)),
        ("set max of coder to 6", order("set_replica_bounds", model=CODER, min_replicas=1, max_replicas=6)),
        ("set the minimum of coder to 5", order("set_replica_bounds", model=CODER, min_replicas=5, max_replicas=5)),
        ("drain qwen3-8b-1", order("drain_replica", replica_id="qwen3-8b-1")),
        ("cordon coder-0.5b-1", order("cordon_replica", replica_id=f"{CODER}-1", cordoned=True)),
        ("take qwen3-8b-0 out of rotation", order("cordon_replica", replica_id="qwen3-8b-0", cordoned=True)),
        ("uncordon qwen3-8b-0", order("cordon_replica", replica_id="qwen3-8b-0", cordoned=False)),
        ("put qwen3-8b-0 back into rotation", order("cordon_replica", replica_id="qwen3-8b-0", cordoned=False)),
        ("route by round robin", order("set_routing_policy", policy="round_robin", parameters={})),
        ("set routing policy to random", order("set_routing_policy", policy="random", parameters={})),
        ("switch to round_robin", order("set_routing_policy", policy="round_robin", parameters={})),
        ("scale by demand_forecast", order("set_scaling_policy", policy="demand_forecast", parameters={})),
        ("scale by target tracking with utilisation=0.7",
         order("set_scaling_policy", policy="target_tracking", parameters={"utilisation": 0.7})),
    ],
)  # fmt: skip
def test_an_order_becomes_a_tool_call(text: str, intent: Intent) -> None:
    assert understood(text) == intent


@pytest.mark.parametrize("text", [sentence for sentence in examples(VIEW) if "undo" not in sentence])
def test_every_example_that_is_offered_is_understood(text: str) -> None:
    assert not isinstance(understood(text), Unclear | Unknown)


def test_a_parameter_belongs_to_a_policy_in_force() -> None:
    name = next(iter(VIEW.scaling.parameters))
    wanted = order("set_policy_parameter", kind="scaling", parameter=name, value=2.5)
    assert understood(f"set {name} to 2.5") == wanted
    assert understood(f"set {name} of target_tracking to 2.5") == wanted
    other = understood(f"set {name} of demand_forecast to 2.5")
    assert isinstance(other, Unclear)
    assert "not in force" in other.problem


def test_a_name_that_fits_two_models_is_asked_back() -> None:
    unclear = understood("why is qwen slow?")
    assert isinstance(unclear, Unclear)
    assert unclear.choices == (CODER, QWEN)


def test_a_name_that_fits_nothing_is_asked_back_with_all_names() -> None:
    unclear = understood("scale weather to 3")
    assert isinstance(unclear, Unclear)
    assert unclear.choices == tuple(VIEW.models)


def test_an_unclear_name_in_an_order_never_becomes_an_order() -> None:
    assert isinstance(understood("drain qwen3-8b"), Unclear)
    assert isinstance(understood("drain everything"), Unclear)


@pytest.mark.parametrize(
    "text",
    [
        "do not scale coder to 3",
        "don't drain qwen3-8b-1",
        "never drain qwen3-8b-1",
        "should I scale coder to 3?",
        "what if I drain qwen3-8b-1",
        "scale coder to 1,005",
        "scale coder to 1.5",
        "scale coder to 3 and drain qwen3-8b-1",
    ],
)
def test_what_is_no_plain_order_never_becomes_one(text: str) -> None:
    assert not isinstance(understood(text), Order)


def test_a_policy_in_force_that_no_catalogue_knows_has_no_parameters() -> None:
    view = replace(VIEW, scaling=replace(VIEW.scaling, policy="of_my_own"))
    assert isinstance(understood("set utilisation to 0.5", view), Unclear)


def test_a_misspelled_name_is_recognised_but_a_number_is_never_taken_for_another() -> None:
    assert understood("scale codr to 3") == understood("scale coder to 3")
    assert isinstance(understood("drain qwen3-8b-7"), Unclear)
    assert resolve("replica-7", ["replica-1", "replica-2"]) == ()


def test_an_exact_name_wins_over_longer_ones() -> None:
    assert resolve("coder-1", ["coder-1", "coder-10", "coder-11"]) == ("coder-1",)


def test_a_replica_that_is_gone_cannot_be_drained() -> None:
    gone = replace(VIEW.replicas["qwen3-8b-1"], state="gone")
    view = replace(VIEW, replicas={**VIEW.replicas, "qwen3-8b-1": gone})
    assert isinstance(understood("drain qwen3-8b-1", view), Unclear)


def test_bounds_of_a_model_that_cannot_be_scaled_are_unclear() -> None:
    unclear = understood("set max of sdxl to 3")
    assert isinstance(unclear, Unclear)
    assert "no bounds" in unclear.problem


def test_undo_means_the_change_that_was_applied_last() -> None:
    rows = [
        replace(a_proposal("scale_model", "kept", proposal_id="pr-old"), applied_at_s=10.0),
        replace(a_proposal("scale_model", "applied", proposal_id="pr-new"), applied_at_s=20.0),
        replace(a_proposal("scale_model", "rolled_back", proposal_id="pr-back"), applied_at_s=30.0),
    ]
    view = replace(VIEW, proposals=tuple(rows))
    assert understood("undo the last change", view) == order("rollback", proposal_id="pr-new")
    assert understood("roll back pr-old", view) == order("rollback", proposal_id="pr-old")
    assert isinstance(understood("undo"), Unclear)


@pytest.mark.parametrize(
    ("text", "decision"),
    [("approve pr-1", "approve"), ("yes", "approve"), ("deny pr-1", "deny"), ("reject it", "deny")],
)
def test_a_sentence_about_a_decision_is_never_an_order(text: str, decision: str) -> None:
    intent = understood(text)
    assert isinstance(intent, Decide)
    assert intent.decision == decision


@pytest.mark.parametrize("text", ["", "   ", "write a poem about bees", "the quick brown fox", "x" * 2000, "?!"])
def test_anything_else_is_unknown_with_three_examples(text: str) -> None:
    intent = understood(text)
    assert isinstance(intent, Unknown)
    assert len(intent.examples) == 3


@given(st.text(max_size=400))
def test_no_text_breaks_the_parser(text: str) -> None:
    assert isinstance(understood(text), Intent)


WORDS = ["why", "is", "the", "slow", "scale", "to", "by", "set", "bounds", "of", "coder", "call", "drain", "min", "max"]
WORDS += ["between", "and", "what", "changed", "in", "last", "3", "ten", "minutes", "route", "with", "=", "..", "-1"]


@given(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join))
def test_no_order_of_its_own_words_breaks_the_parser(text: str) -> None:
    assert isinstance(understood(text), Intent)


@given(st.sampled_from(["scale coder to 3", "why is coder slow", "what changed in the last ten minutes"]), st.data())
def test_case_and_punctuation_do_not_matter(text: str, data: st.DataObject) -> None:
    shouted = "".join(c.upper() if data.draw(st.booleans()) else c for c in text)
    assert understood(f"  {shouted.replace(' ', '  ')}?! ") == understood(text)


@pytest.mark.parametrize(("seconds", "words"), [(600.0, "10 minutes"), (3600.0, "1 hour"), (90.0, "90 seconds")])
def test_a_span_is_told_as_people_say_it(seconds: float, words: str) -> None:
    assert span_words(seconds) == words

"""Replies: proper ones are understood, whatever form they come in; all others are refused, in words of our own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.control import ControlView, Reply, ToolCall
from swarmx.llm_coordinator.prompt import offered
from swarmx.llm_coordinator.reply import Parsed, Unusable, cleaned, read_reply
from swarmx.llm_coordinator.snapshot import snapshot
from tests.llm_coordinator.scripted import says
from tests.llm_coordinator.views import REGISTRY, SCHEMAS, TOOLS, WORDS, a_model, a_proposal, a_view

CHANGE = a_proposal("set_replica_bounds", "applied", proposal_id="p7", model="coder", min_replicas=1, max_replicas=2)
VIEW = a_view(
    a_model("coder", waiting=9),
    a_model("fixed", min_replicas=None, max_replicas=None, limit=None, wanted=None),
    proposals=(CHANGE,),
)
GOOD = {"model": "m1", "min_replicas": 1, "max_replicas": 4, "reason": "m1 has 9 waiting."}


def read(reply: Reply, view: ControlView = VIEW) -> Parsed | Unusable:
    situation, aliases = snapshot(view, "timer", WORDS)
    return read_reply(reply, TOOLS, aliases, offered(SCHEMAS, situation))


def text(content: object) -> Reply:
    return Reply(text=content if isinstance(content, str) else json.dumps(content))


def test_a_call_comes_back_with_real_names() -> None:
    assert read(says("set_replica_bounds", **GOOD)) == Parsed(
        call=ToolCall(tool="set_replica_bounds", arguments={"model": "coder", "min_replicas": 1, "max_replicas": 4}),
        reason="coder has 9 waiting.",
    )


def test_replicas_and_changes_have_real_names_too() -> None:
    cordon = read(says("cordon_replica", replica_id="r2", cordoned=True))
    assert isinstance(cordon, Parsed)
    assert cordon.call.arguments["replica_id"] == "coder-1"
    back = read(says("rollback", proposal_id="c1"))
    assert isinstance(back, Parsed)
    assert back.call.arguments == {"proposal_id": "p7"}


@pytest.mark.parametrize(
    "content",
    [
        {"name": "set_replica_bounds", "arguments": GOOD},
        {"name": "set_replica_bounds", "parameters": GOOD},
        {"name": "set_replica_bounds", "arguments": json.dumps(GOOD)},
        [{"name": "set_replica_bounds", "arguments": GOOD}],
        f"Sure!\n```json\n{json.dumps({'name': 'set_replica_bounds', 'arguments': GOOD})}\n```\n",
        f"```\n{json.dumps({'name': 'set_replica_bounds', 'arguments': GOOD})}```",
    ],
    ids=["object", "parameters", "text in text", "a list of one", "fenced", "bare fence"],
)
def test_a_call_written_as_text_counts(content: object) -> None:
    assert read(text(content)) == read(says("set_replica_bounds", **GOOD))


def test_nothing_to_do_needs_no_arguments() -> None:
    for reply in (says("no_op"), Reply(tool="no_op"), text({"name": "no_op"}), says("no_op", reason=7)):
        assert read(reply) == Parsed(call=ToolCall(tool="no_op", arguments={}), reason="")


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (text(""), "empty"),
        (text(" \n"), "empty"),
        (text("I would scale up."), "text"),
        (text({"tool": "no_op"}), "text"),
        (text([{"name": "no_op"}, {"name": "no_op"}]), "several"),
        (text("[" * 100_000), "text"),
        (text({"name": "no_op", "arguments": [1]}), "object"),
        (Reply(tool="no_op", arguments="{'a': 1}"), "object"),
        (Reply(tool="no_op", arguments='{"reason": NaN}'), "object"),
        (says("launch_missiles"), "no such tool"),
        (says("inspect_cluster"), "no such tool"),
        (says("set_replica_bounds", **GOOD | {"model": "m9"}), "model must be one of m1"),
        (says("set_replica_bounds", **GOOD | {"model": "coder"}), "model must be one of m1"),
        (says("set_replica_bounds", **GOOD | {"model": "m2"}), "model must be one of m1"),
        (says("set_replica_bounds", **GOOD | {"model": ["m1"]}), "model must be one of m1"),
        (says("drain_replica", replica_id="r99"), "replica_id must be one of r1, r2"),
        (says("rollback", proposal_id="p7"), "proposal_id must be one of c1"),
        (says("set_routing_policy", policy="fastest"), "policy must be one of random"),
        (says("set_replica_bounds", **GOOD | {"max_replicas": "4"}), "max_replicas missing or out of range"),
        (says("set_replica_bounds", **GOOD | {"max_replicas": 4.5}), "max_replicas missing or out of range"),
        (says("set_replica_bounds", **GOOD | {"max_replicas": 10**30}), "max_replicas missing or out of range"),
        (says("set_replica_bounds", **GOOD | {"min_replicas": -1}), "min_replicas missing or out of range"),
        (says("set_replica_bounds", **GOOD | {"min_replicas": 5}), "contradict"),
        (says("set_replica_bounds", model="m1"), "max_replicas, min_replicas missing"),
        (says("cordon_replica", replica_id="r1", cordoned="yes"), "cordoned missing or out of range"),
        (says("cordon_replica", replica_id="r1", cordoned=True, force=True), "these arguments only"),
        (says("no_op", rm="-rf"), "these arguments only"),
    ],
)
def test_a_reply_is_refused(reply: Reply, why: str) -> None:
    found = read(reply)
    assert isinstance(found, Unusable)
    assert why in found.why


@pytest.mark.parametrize("error", ["unreachable", "late", "refused", "too_long", "not_a_reply"])
def test_a_failed_reply_is_refused_even_with_a_call_in_it(error: Any) -> None:
    found = read(Reply(tool="no_op", error=error))
    assert isinstance(found, Unusable)


def test_why_it_was_refused_repeats_nothing_that_was_sent() -> None:
    secret = "SmuggledWord"
    for reply in (
        text(secret),
        says(secret),
        says("no_op", **{secret: secret}),
        says("set_replica_bounds", **GOOD | {"model": secret}),
        says("set_replica_bounds", **GOOD | {"max_replicas": secret}),
    ):
        found = read(reply)
        assert isinstance(found, Unusable)
        assert secret not in found.why


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a\n\tb\x00\x1b[31m  c\u202e", "a b [31m c"),
        ("x" * 500, "x" * 159 + "…"),
        ("y" * 160, "y" * 160),
    ],
)
def test_a_reason_is_one_short_printable_line(written: str, shown: str) -> None:
    assert cleaned(written) == shown


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_VALUES = _JSON | st.sampled_from(["m1", "m2", "r1", "r4", "c1", "least_work", "routing", "scaling", "target"])
_KEYS = st.sampled_from(sorted({name for tool in TOOLS.values() for name in tool.arguments.model_fields} | {"reason"}))


@settings(max_examples=300)
@given(
    tool=st.sampled_from([*REGISTRY.tools, "nonsense"]),
    arguments=st.dictionaries(_KEYS | st.text(max_size=6), _VALUES, max_size=5) | _JSON,
    as_text=st.booleans(),
)
def test_what_is_accepted_the_tool_accepts_and_names_what_is_there(tool: str, arguments: Any, as_text: bool) -> None:
    reply = (
        text({"name": tool, "arguments": arguments}) if as_text else Reply(tool=tool, arguments=json.dumps(arguments))
    )
    found = read(reply)
    if isinstance(found, Parsed):
        understood = REGISTRY.understand(found.call)
        assert understood.call == found.call
        assert found.call.arguments.get("model", "coder") == "coder"
        assert found.call.arguments.get("replica_id", "coder-0") in VIEW.replicas
        assert len(found.reason) <= 160

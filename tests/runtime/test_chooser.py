"""Choosing: the model is asked with patience, asked again where that helps, and the rules stand in by name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarmx.core.control import Prompt, Reply
from swarmx.llm_coordinator.prompt import Prompts, templates_folder
from swarmx.runtime.chooser import Choice, Chooser, ask
from tests.llm_coordinator.scripted import FOREVER, ScriptedModel, says
from tests.llm_coordinator.views import CATALOGUE, REGISTRY, a_model, a_view

PROMPT = Prompt(system="s", user="u", tools=(), max_tokens=9)
PROMPTS = Prompts(templates_folder())
BUSY = a_view(a_model("coder", waiting=9, wanted=4.0))
GOOD = says("set_replica_bounds", model="m1", min_replicas=1, max_replicas=3, reason="m1 waits.")


async def chosen(model: ScriptedModel | None, *, deadline_s: float = 5.0) -> Choice:
    chooser = Chooser(
        model=model, prompts=PROMPTS, tools=REGISTRY.tools, catalogue=CATALOGUE, step=2, deadline_s=deadline_s
    )
    situation, aliases = chooser.situation(BUSY, "at_max")
    return await chooser.choose(BUSY, situation, aliases, ())


async def test_the_models_call_is_taken_with_figures_and_hashes() -> None:
    with ScriptedModel(GOOD) as script:
        choice = await chosen(script)
    assert (choice.source, choice.call.tool, choice.reason, choice.fallback) == (
        "model",
        "set_replica_bounds",
        "coder waits.",
        "",
    )
    assert choice.call.arguments == {"model": "coder", "min_replicas": 1, "max_replicas": 3}
    assert ("waiting", "coder", 9) in [(e.metric, e.subject, e.value) for e in choice.evidence]
    assert choice.model is not None
    assert choice.model.name == "scripted"
    assert len(choice.model.prompt_sha256) == len(choice.model.reply_sha256) == 64
    assert len(script.asked) == len(choice.replies) == 1


async def test_the_hashes_tell_other_prompts_and_replies_apart() -> None:
    other = says("set_replica_bounds", model="m1", min_replicas=1, max_replicas=3, reason="m1 waits!")
    with ScriptedModel(GOOD, GOOD, other) as script:
        one, same, different = [(await chosen(script)).model for _ in range(3)]
    assert one == same
    assert one is not None
    assert different is not None
    assert one.prompt_sha256 == different.prompt_sha256
    assert one.reply_sha256 != different.reply_sha256


async def test_without_a_model_the_rules_choose() -> None:
    choice = await chosen(None)
    assert (choice.source, choice.fallback, choice.replies) == ("rules", "there is no model", ())
    assert choice.call.tool == "set_replica_bounds"
    assert choice.evidence


UNUSABLE = [
    Reply(text="Scale it up, I say."),
    Reply(text='{"name": "no_op"'),
    Reply(tool="no_op", arguments="}{"),
    says("launch_missiles"),
    says("drain_replica", replica_id="r99"),
    says("set_replica_bounds", model="m1", min_replicas=1, max_replicas=10**9),
    Reply(error="too_long"),
    Reply(error="not_a_reply"),
    RuntimeError("a bug in the client"),
]
KINDS = ["text", "torn", "torn arguments", "invented tool", "invented replica", "absurd", "endless", "several", "bug"]


@pytest.mark.parametrize("bad", UNUSABLE, ids=KINDS)
async def test_a_reply_that_cannot_be_used_is_asked_for_again_with_what_was_wrong(bad: Any) -> None:
    with ScriptedModel(bad, GOOD) as script:
        choice = await chosen(script)
    assert (choice.source, choice.unusable, choice.fallback) == ("model", 1, "")
    first, second = (prompt.user for prompt in script.asked)
    assert "could not be used" not in first
    assert "could not be used" in second


@pytest.mark.parametrize("bad", UNUSABLE, ids=KINDS)
async def test_after_the_second_bad_reply_the_rules_stand_in(bad: Any) -> None:
    with ScriptedModel(bad, bad) as script:
        choice = await chosen(script)
    assert (choice.source, choice.unusable) == ("rules", 2)
    assert choice.fallback
    assert choice.model is None


@pytest.mark.parametrize("error", ["unreachable", "late"])
async def test_a_model_that_is_killed_is_tried_twice_then_the_rules_stand_in(error: Any) -> None:
    with ScriptedModel(Reply(error=error), Reply(error=error)) as script:
        choice = await chosen(script)
    assert (choice.source, choice.unusable, choice.call.tool) == ("rules", 0, "set_replica_bounds")
    assert choice.fallback in ("the model cannot be reached.", "the answer took too long.")


async def test_a_model_that_refuses_is_not_asked_again() -> None:
    with ScriptedModel(Reply(error="refused")) as script:
        assert (await chosen(script)).source == "rules"


async def test_a_model_that_never_answers_costs_no_more_than_the_deadline() -> None:
    async with asyncio.timeout(60.0):
        with ScriptedModel(FOREVER, FOREVER) as script:
            choice = await chosen(script, deadline_s=0.2)
    assert (choice.source, choice.fallback) == ("rules", "the answer took too long.")


async def test_the_model_is_not_offered_to_look_only() -> None:
    with ScriptedModel(GOOD) as script:
        await chosen(script)
    names = {tool["function"]["name"] for tool in script.asked[0].tools}
    assert "no_op" in names
    assert not names & {"inspect_cluster", "inspect_model", "why_decision"}


@pytest.mark.parametrize("error", ["unreachable", "late"])
async def test_a_failure_that_may_pass_is_tried_once_more(error: Any) -> None:
    with ScriptedModel(Reply(error=error), says("no_op")) as script:
        assert (await ask(script, PROMPT, deadline_s=1.0)).tool == "no_op"


@pytest.mark.parametrize("error", ["refused", "too_long", "not_a_reply"])
async def test_a_failure_that_will_not_pass_is_not_tried_again(error: Any) -> None:
    with ScriptedModel(Reply(error=error)) as script:
        assert (await ask(script, PROMPT, deadline_s=1.0)).error == error


async def test_it_gives_up_after_the_second_try() -> None:
    with ScriptedModel(Reply(error="unreachable"), Reply(error="unreachable", detail="again")) as script:
        assert (await ask(script, PROMPT, deadline_s=1.0)).detail == "again"


async def test_a_model_that_hangs_leaves_time_for_the_next_try() -> None:
    with ScriptedModel(FOREVER, says("no_op")) as script:
        assert (await ask(script, PROMPT, deadline_s=0.3)).tool == "no_op"


async def test_a_model_that_hangs_twice_is_late_within_the_deadline() -> None:
    loop = asyncio.get_running_loop()
    with ScriptedModel(FOREVER, FOREVER) as script:
        async with asyncio.timeout(60.0):
            began_s = loop.time()
            reply = await ask(script, PROMPT, deadline_s=0.2)
    assert reply.error == "late"
    assert loop.time() > began_s


async def test_a_client_that_raises_has_not_replied() -> None:
    with ScriptedModel(RuntimeError("a bug")) as script:
        assert (await ask(script, PROMPT, deadline_s=1.0)).error == "not_a_reply"


async def test_a_deadline_that_has_passed_is_late() -> None:
    with ScriptedModel(FOREVER, FOREVER) as script:
        assert (await ask(script, PROMPT, deadline_s=-1.0)).error == "late"

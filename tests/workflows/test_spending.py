"""What calls use up is charged to their node, to what is around it and to the run, and no budget is gone beyond."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Failure
from swarmx.workflows.events import (
    Event,
    Failed,
    Finished,
    NodeFinished,
    NodeStarted,
    Spent,
    decode_event,
    encode_event,
)
from swarmx.workflows.forks import fork
from swarmx.workflows.plan import advance
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.spending import Price, most_of, prompt_estimate, used
from swarmx.workflows.state import Run
from tests.workflows.agents import VERDICT, Agent, called, said
from tests.workflows.histories.record import text

PRICES = {"m": Price(input_per_million=1e6, output_per_million=2e6), "sdxl": Price(per_image=3.0)}
CALL = {"kind": "llm", "model": "m", "prompt": "p", "max_tokens": 100}
PROMPT = prompt_estimate({"messages": [{"role": "user", "content": "p"}]})
MOST = PROMPT + 100  # tokens of one call


def started(nodes: dict[str, Any], **whole: Any) -> tuple[Run, list[Event], list[str]]:
    run, submitted = Run.start(parse_workflow({"name": "x", "nodes": nodes, **whole}), {})
    events, calls = advance(run, now_s=0.0, prices=PRICES)
    return run, [submitted, *events], [call.path for call in calls]


def answer(run: Run, path: str, **spent: Any) -> tuple[list[Event], list[str]]:
    event = NodeFinished(path=path, output=text("x"), spent=Spent(steps=1, **spent))
    events, calls = advance(run, [event], now_s=0.0, prices=PRICES)
    return events, [call.path for call in calls]


def test_what_is_spent_is_charged_to_the_node_to_those_around_it_and_to_the_run() -> None:
    run, _, _ = started({"m": {"kind": "map", "over": "[1, 2]", "do": {"a": CALL}}, "b": CALL})
    answer(run, "m[0].a", prompt_tokens=10, output_tokens=5, money=1.5, replica_s=0.5)
    answer(run, "m[1].a", prompt_tokens=10, output_tokens=7, money=0.5)
    answer(run, "b", output_tokens=1)
    assert run.ledger.spent_by("m[0].a").tokens == 15
    assert run.ledger.spent_by("m") == Spent(steps=2, prompt_tokens=20, output_tokens=12, money=2.0, replica_s=0.5)
    assert run.ledger.spent_by("") == Spent(steps=3, prompt_tokens=20, output_tokens=13, money=2.0, replica_s=0.5)


def test_failed_attempts_are_charged_too() -> None:
    run, _, _ = started({"a": CALL | {"retry": {"backoff_s": 0.0}}})
    spent = Spent(steps=1, output_tokens=40)
    advance(run, [after_failure(run, "a", Failure(cause="invalid", error="x"), 0.0, spent=spent)], now_s=0.0)
    answer(run, "a", output_tokens=2)
    assert run.ledger.spent_by("") == Spent(steps=2, output_tokens=42)


def test_without_budgets_events_reserve_nothing() -> None:
    _, events, _ = started({"a": CALL})
    assert events[-1] == NodeStarted(path="a", kind="llm")


def test_a_call_that_could_go_beyond_the_budget_of_the_run_is_not_made() -> None:
    nodes = {"a": CALL, "b": CALL | {"needs": ["a"]}}
    run, events, calls = started(nodes, budget={"tokens": 2 * MOST - 1})
    assert calls == ["a"]
    assert isinstance(events[-1], NodeStarted)
    assert events[-1].reserved == Spent(steps=1, prompt_tokens=PROMPT, output_tokens=100, money=PROMPT + 200.0)
    answer(run, "a", prompt_tokens=PROMPT, output_tokens=100)
    assert run.end == Failed(
        path="b",
        error=f"the budget of the workflow allows {2 * MOST - 1} tokens; {MOST} are spent, 0 may be by calls that are "
        f"out, and this one could take {MOST}",
    )


def test_what_was_not_used_of_the_most_is_there_for_the_next_call() -> None:
    run, _, _ = started({"a": CALL, "b": CALL | {"needs": ["a"]}}, budget={"tokens": 2 * MOST - 1})
    assert answer(run, "a", prompt_tokens=PROMPT, output_tokens=99)[1] == ["b"]


def test_calls_that_are_out_count_before_they_answer() -> None:
    run, events, _ = started({"m": {"kind": "map", "over": "[1, 2, 3]", "do": {"a": CALL}}}, budget={"steps": 2})
    assert [event.path for event in events if isinstance(event, NodeStarted)] == ["m[0].a", "m[1].a"]
    assert isinstance(run.end, Failed)
    assert "allows 2 steps; 0 are spent, 2 may be by calls that are out" in run.end.error


def test_the_budget_of_a_node_holds_for_all_that_is_inside_it_and_for_nothing_else() -> None:
    loop = {"kind": "loop", "max_iterations": 5, "budget": {"steps": 2}, "do": {"a": CALL}}
    run, _, calls = started({"l": loop, "b": CALL, "c": CALL})
    assert calls == ["b", "c", "l[1].a"]
    assert answer(run, "l[1].a")[1] == ["l[2].a"]
    answer(run, "l[2].a")
    assert isinstance(run.end, Failed)
    assert run.end.path == "l[3].a"
    assert run.end.error.startswith("the budget of l allows 2 steps; 2 are spent")


def test_the_budget_of_a_sub_workflow_is_that_of_its_node() -> None:
    sub = {"w": {"nodes": {"a": CALL, "b": CALL | {"needs": ["a"]}}}}
    run, _, _ = started({"s": {"kind": "workflow", "use": "w", "budget": {"steps": 1}}}, workflows=sub)
    answer(run, "s.a")
    assert isinstance(run.end, Failed)
    assert run.end.error.startswith("the budget of s allows 1 steps; 1 are spent")


def test_retries_count_against_the_budget_of_their_node() -> None:
    node = CALL | {"retry": {"attempts": 5, "backoff_s": 0.0}, "budget": {"tokens": MOST + 50}}
    run, _, _ = started({"a": node})
    spent = Spent(steps=1, output_tokens=60)
    advance(run, [after_failure(run, "a", Failure(cause="invalid", error="x"), 0.0, spent=spent)], now_s=0.0)
    assert isinstance(run.end, Failed)
    assert run.end.error.startswith(f"the budget of a allows {MOST + 50} tokens; 60 are spent")


def test_an_attempt_of_which_nothing_is_known_counts_as_the_most_it_could_use() -> None:
    node = CALL | {"timeout_s": 5.0, "retry": {"backoff_s": 0.0}, "budget": {"tokens": 10 * MOST}}
    run, _, _ = started({"a": node})
    advance(run, now_s=5.0)
    assert run.ledger.spent_by("a").tokens == MOST
    assert run.ledger.reserved_by("a").tokens == MOST, "the second attempt is out"


def test_money_goes_by_the_prices_that_hold_when_the_call_starts() -> None:
    nodes = {"a": {"kind": "image", "model": "sdxl", "prompt": "p", "n": 2, "budget": {"money": 5.0}}}
    run, _, calls = started(nodes)
    assert calls == []
    assert run.end == Failed(
        path="a",
        error="the budget of a allows 5 money; 0 are spent, 0 may be by calls that are out, and this one could take 6",
    )
    free, _ = Run.start(parse_workflow({"name": "x", "nodes": nodes}), {})
    assert [call.path for call in advance(free, now_s=0.0)[1]] == ["a"], "without prices, nothing costs anything"


def test_sums_of_money_are_not_tripped_by_their_rounding() -> None:
    loop = {"kind": "loop", "max_iterations": 3, "do": {"a": CALL | {"max_tokens": 1}}}
    run, _ = Run.start(parse_workflow({"name": "x", "nodes": {"l": loop}, "budget": {"money": 0.3}}), {})
    cents = {"m": Price(output_per_million=1e5)}
    _, calls = advance(run, now_s=0.0, prices=cents)
    while calls:
        done = NodeFinished(path=calls[0].path, output=text("x"), spent=Spent(steps=1, money=0.1))
        _, calls = advance(run, [done], now_s=0.0, prices=cents)
    assert isinstance(run.end, Finished), "0.1 + 0.1 + 0.1 is a little more than 0.3"


def test_seconds_of_replicas_are_known_only_afterwards_and_end_what_follows() -> None:
    run, _, _ = started({"a": CALL, "b": CALL | {"needs": ["a"]}}, budget={"replica_s": 2.0})
    answer(run, "a", replica_s=2.5)
    assert isinstance(run.end, Failed)
    assert run.end.error.startswith("the budget of the workflow allows 2 replica_s; 2.5 are spent")


def test_what_was_spent_and_is_reserved_survives_a_restart() -> None:
    nodes = {"a": CALL, "b": CALL}
    run, events, _ = started(nodes, budget={"tokens": 3 * MOST})
    events += answer(run, "a", prompt_tokens=3, output_tokens=4, money=0.25, replica_s=1.5)[0]
    again = Run.rebuild([decode_event(encode_event(event)) for event in events])
    assert again == run
    assert again.ledger.spent_by("").tokens == 7
    assert again.ledger.reserved_by("").tokens == MOST


def test_a_fork_has_the_whole_budget_again() -> None:
    run, events, _ = started({"a": CALL, "b": CALL | {"needs": ["a"]}}, budget={"tokens": 2 * MOST - 1})
    events += answer(run, "a", prompt_tokens=PROMPT, output_tokens=100)[0]
    begun = Run.rebuild(fork(events, "b", forked_from="wf-old"))
    assert begun.ledger.spent == {}
    assert [call.path for call in advance(begun, now_s=0.0)[1]] == ["b"]


def test_what_a_call_used_is_priced() -> None:
    assert used("m", PRICES, prompt_tokens=2, output_tokens=3, replica_s=1.0) == Spent(
        steps=1, prompt_tokens=2, output_tokens=3, money=8.0, replica_s=1.0
    )
    assert used("unknown", PRICES, prompt_tokens=2, output_tokens=3).money == 0.0


def test_the_most_of_a_call_counts_its_prompt_its_limit_and_what_they_cost() -> None:
    run, _ = Run.start(parse_workflow({"name": "x", "nodes": {"a": CALL | {"prompt": "p" * 4000}}}), {})
    (call,) = advance(run, now_s=0.0)[1]
    most = most_of(call, PRICES)
    assert 1000 <= most.prompt_tokens <= 1020
    assert (most.output_tokens, most.steps) == (100, 1)
    assert most.money == most.prompt_tokens + 200.0


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ({"tokns": 1}, "unknown field 'tokns' .did you mean 'tokens'"),
        ({"tokens": 0}, "greater than or equal to 1"),
        ({"money": -1.0}, "greater than 0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget: dict[str, Any], problem: str) -> None:
    for definition in (
        {"name": "x", "nodes": {"a": CALL}, "budget": budget},
        {"name": "x", "nodes": {"a": CALL | {"budget": budget}}},
    ):
        with pytest.raises(WorkflowError, match=problem):
            parse_workflow(definition)


LOOK = {"look": {"nodes": {"q": CALL}}}


def test_the_tools_of_an_agent_leave_of_its_budget_what_its_answer_takes() -> None:
    agent = Agent(whole={"workflows": LOOK}, workflows=["look"], budget={"steps": 4})
    agent.model("a.1", called(*[("look", {})] * 4), spent=Spent(steps=1))
    assert list(agent.out) == ["a.1.1.q", "a.1.2.q"]
    for path in list(agent.out):
        agent.model(path, said("seen"), spent=Spent(steps=1))
    told = [message["content"] for message in agent.messages("a.2") if message["role"] == "tool"]
    assert told[0] == told[1] == '{"q":{"text":"seen","json":null,"usage":{}}}'
    assert told[2] == told[3]
    assert told[2] == (
        "Error: the budget of a allows 4 steps; 1 are spent, 2 may be by calls that are out, and this one could take 2"
        ", with the answer that its agent is still to give"
    )
    assert agent.body("a.2")["tool_choice"] == "none"
    agent.model("a.2", said("Seen twice."), spent=Spent(steps=1))
    assert agent.left["text"] == "Seen twice."


def test_an_agent_inside_a_tool_of_another_one_leaves_that_one_its_answer() -> None:
    inner = {"kind": "agent", "model": "m", "prompt": "p", "functions": ["upper"]}
    agent = Agent(whole={"workflows": {"deep": {"nodes": {"b": inner}}}}, workflows=["deep"], budget={"steps": 4})
    agent.model("a.1", called(("deep", {})), spent=Spent(steps=1))
    assert agent.body("a.1.1.b.1")["tool_choice"] == "none", "of the three steps that are left one is not its own"
    agent.model("a.1.1.b.1", said("found"), spent=Spent(steps=1))
    agent.model("a.2", said("Found."), spent=Spent(steps=1))
    assert agent.left["text"] == "Found."


def test_what_is_asked_for_along_with_the_last_answer_needs_to_leave_nothing() -> None:
    agent = Agent(budget={"steps": 2}, schema=VERDICT)
    agent.model("a.1", called(("answer", {"verdict": "yes"}), ("pay", {"city": "Oslo"})), spent=Spent(steps=1))
    agent.tool("a.1.2", "paid")
    assert agent.left["json"] == {"verdict": "yes"}

"""What a running workflow's calls use up is told by their answers and records, priced, kept, shown, and bounded."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmx.core.failures import Failure
from swarmx.core.records import CallRecord, ModelRequest, ModelResult
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.node_spending import spent_by
from swarmx.workflows.events import Spent
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.spending import Price
from swarmx.workflows.work import StartModelCall, StartToolCall
from tests.contract.test_store import call_record
from tests.runtime.runners import EchoModel, Start, chat

PRICES = {"m": Price(input_per_million=1e6, output_per_million=1e6, per_image=2.0)}
CALL = StartModelCall(path="a", kind="llm", role="r", model="m", body={})
PICTURE = StartModelCall(path="a", kind="image", role="r", model="m", body={})
TOOL = StartToolCall(path="a", tool="t", arguments={})
TWICE = """
name: twice
budget: {steps: 3, money: 100.0}
nodes:
  first: {kind: llm, model: m, prompt: hello, max_tokens: 10, budget: {tokens: 500}, retry: {backoff_s: 0}}
  second: {kind: llm, model: m, prompt: "{{ first.text }}", max_tokens: 10}
"""


def result(answer: Any = None, record: CallRecord | None = None) -> ModelResult:
    failure = Failure(cause="replica", error="broke") if answer is None else None
    return ModelResult(call_id="c", replica_id="r1", attempts=1, answer=answer, failure=failure, record=record)


def counted(prompt_tokens: Any, completion_tokens: Any) -> dict[str, Any]:
    return chat("x") | {"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


RECORD = call_record("c")  # 3 prompt tokens, 7 of work, half a second on the replica
NEVER_SENT = msgspec.structs.replace(RECORD, dispatched_at_s=None)


@pytest.mark.parametrize(
    ("call", "what", "spent"),
    [
        (CALL, result(counted(2, 5), RECORD),
         Spent(steps=1, prompt_tokens=2, output_tokens=5, money=7.0, replica_s=0.5)),
        (CALL, result(counted(2, 5)), Spent(steps=1, prompt_tokens=2, output_tokens=5, money=7.0)),
        (CALL, result(chat("x"), RECORD), Spent(steps=1, prompt_tokens=1, output_tokens=7, money=8.0, replica_s=0.5)),
        (CALL, result(counted("2", -5), RECORD),
         Spent(steps=1, prompt_tokens=3, output_tokens=7, money=10.0, replica_s=0.5)),
        (CALL, result(None, RECORD), Spent(steps=1, prompt_tokens=3, output_tokens=7, money=10.0, replica_s=0.5)),
        (CALL, result(None, NEVER_SENT), Spent(steps=1)),
        (CALL, result(None), Spent(steps=1)),
        (PICTURE, result({"data": [{}, {}]}, RECORD), Spent(steps=1, money=4.0, replica_s=0.5)),
        (PICTURE, result({"data": 7}), Spent(steps=1)),
        (TOOL, result({"output": 1}, RECORD), Spent(steps=1, replica_s=0.5)),
    ],
)  # fmt: skip
def test_an_attempt_used_what_its_answer_says_else_what_its_record_says(
    call: StartModelCall | StartToolCall, what: ModelResult, spent: Spent
) -> None:
    assert spent_by(call, what, PRICES) == spent


async def test_what_a_workflow_spends_is_shown_with_its_budgets(start: Start) -> None:
    failed_once: list[str] = []

    def first(request: ModelRequest) -> ModelResult:
        if not failed_once:
            failed_once.append(request.request_id)
            return result(None, RECORD)
        return result(counted(20, 10), RECORD)

    runner = start(EchoModel(answers={"first": first, "second": lambda _: result(counted(1, 1))}), prices=PRICES)
    workflow_id = await runner.submit(parse_workflow(TWICE), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"
    shown = await runner.describe(workflow_id, "a")
    assert shown["spent"] == {
        "steps": 3, "prompt_tokens": 24, "output_tokens": 18, "money": 42.0, "replica_s": 1.0
    }  # fmt: skip
    assert shown["budget"] == {"tokens": None, "steps": 3, "money": 100.0, "replica_s": None}
    one, two = shown["nodes"]
    assert (one["spent"]["steps"], one["spent"]["output_tokens"], one["budget"]["tokens"]) == (2, 17, 500)
    assert (two["spent"]["steps"], two["budget"]) == (1, None)


async def test_a_restart_does_not_forget_what_was_spent(store: SqliteStore, start: Start) -> None:
    hung = EchoModel(answers={"first": lambda _: result(counted(400, 10))}, hung=frozenset({"second"}))
    first = start(hung)
    source = TWICE.replace("steps: 3, money: 100.0", "tokens: 450") + (
        '  third: {kind: llm, model: m, prompt: "{{ second.text }}", max_tokens: 10}\n'
    )
    workflow_id = await first.submit(parse_workflow(source), {}, "a")
    await hung.hanging.wait()
    await first.close()
    second = start(EchoModel(answers={"second": lambda _: result(counted(30, 5))}))
    await second.recover()
    assert (await second.wait(workflow_id, "a")).state == "failed"
    shown = await second.describe(workflow_id, "a")
    assert shown["error_node"] == "third"
    assert shown["error"].startswith("the budget of the workflow allows 450 tokens; 445 are spent")
    assert shown["spent"]["prompt_tokens"] == 430

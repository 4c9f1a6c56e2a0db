"""The workflow runner: durable, resumable, ends each workflow once."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.errors import NotFound, StoreError, Unavailable, WorkflowError
from swarmx.core.records import Commit, Committed, ModelRequest, ModelResult, WorkflowRecord
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.events import Failed, Submitted, decode_event, encode_event
from swarmx.workflows.spec import parse_workflow
from tests.runtime.runners import (
    CHAIN,
    ONE,
    TWO,
    EchoModel,
    FixedClock,
    Start,
    nodes_finished,
    refusal,
    terminal_events,
)


async def test_a_workflow_runs_to_its_outputs(store: SqliteStore, start: Start) -> None:
    model = EchoModel()
    changes: list[str] = []
    runner = start(model, on_change=changes.append)
    workflow_id = await runner.submit(parse_workflow(CHAIN), {"topic": "bees"}, "a")
    record = await runner.wait(workflow_id, "a")
    assert record.state == "finished"
    assert json.loads(record.outcome or b"") == {"answer": "WORK ON ONE, WORK ON TWO, WORK ON THREE"}
    assert sorted(request.node for request in model.asked) == [
        "each[0].work",
        "each[1].work",
        "each[2].work",
        "plan",
        "sum_up",
    ]
    worker = next(request for request in model.asked if request.node == "each[1].work")
    assert (worker.role, worker.tenant, worker.workflow_id, worker.workflow_kind) == (
        "worker",
        "a",
        workflow_id,
        "test",
    )
    assert set(changes) == {workflow_id}
    assert runner.running == 0


async def test_the_calls_of_a_workflow_have_its_priority_after_a_restart_too(store: SqliteStore, start: Start) -> None:
    spec = parse_workflow(ONE.replace("nodes:", "priority: -3, nodes:", 1))
    first = EchoModel(hung=frozenset({"only"}))
    runner = start(first)
    workflow_id = await runner.submit(spec, {}, "a")
    await first.hanging.wait()
    await runner.close()
    second = EchoModel()
    again = start(second)
    await again.recover()
    await again.wait(workflow_id, "a")
    assert [request.priority for request in (*first.asked, *second.asked)] == [-3, -3]


async def test_a_submission_is_durable_before_it_returns(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel(hung=frozenset({"only"})))
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    first = (await store.events(workflow_id))[0]
    assert isinstance(decode_event(first.body), Submitted)


async def test_the_description_shows_nodes_states_and_times(start: Start) -> None:
    clock = FixedClock()
    model = EchoModel(hung=frozenset({"each[1].work"}))
    runner = start(model, clock)
    workflow_id = await runner.submit(parse_workflow(CHAIN), {"topic": "bees"}, "a")
    await model.hanging.wait()
    shown = await runner.describe(workflow_id, "a")
    nodes = {node["path"]: node for node in shown["nodes"]}
    assert shown["state"] == "running"
    assert shown["inputs"] == {"topic": "bees"}
    assert nodes["plan"]["state"] == "finished"
    assert nodes["plan"]["call_id"] == "call-plan"
    assert nodes["plan"]["ended_at_s"] == 1000.0
    assert nodes["each[1].work"] | {"ready_at_s": None} == {
        "path": "each[1].work",
        "parent": "each",
        "kind": "llm",
        "state": "running",
        "needs": [],
        "role": "worker",
        "model": "m",
        "ready_at_s": None,
        "started_at_s": 1000.0,
        "ended_at_s": None,
        "call_id": None,
        "attempt": 1,
        "not_before_s": None,
        "awaits": [],
        "error": None,
        "spent": None,
        "budget": None,
    }
    assert nodes["sum_up"]["state"] == "waiting"
    assert nodes["sum_up"]["needs"] == ["each"]


async def test_a_runner_that_dies_is_continued_by_the_next(tmp_path: Path) -> None:
    first_store = SqliteStore(tmp_path / "swarmx.db")
    await first_store.open()
    died = EchoModel(hung=frozenset({"each[1].work"}))
    abandoned = WorkflowRunner(first_store, died, FixedClock())
    workflow_id = await abandoned.submit(parse_workflow(CHAIN), {"topic": "bees"}, "a")
    await died.hanging.wait()
    while not {"each[0].work", "each[2].work"} <= await nodes_finished(first_store, workflow_id):
        await asyncio.sleep(0)  # it dies between two writes: while it lives, it would win against its successor

    second_store = SqliteStore(tmp_path / "swarmx.db")
    await second_store.open()
    model = EchoModel()
    runner = WorkflowRunner(second_store, model, FixedClock())
    assert await runner.recover() == 1
    record = await runner.wait(workflow_id, "a")
    assert record.state == "finished"
    nodes = [request.node for request in model.asked]
    assert "plan" not in nodes, "what had finished is not done again"
    assert nodes.count("each[1].work") == 1
    assert await terminal_events(second_store, workflow_id) == ["Finished"]
    assert await runner.recover() == 0

    await abandoned.close()
    await runner.close()
    await first_store.close()
    await second_store.close()


async def test_a_runner_that_lost_its_workflow_changes_nothing(store: SqliteStore, start: Start) -> None:
    hold = asyncio.Event()

    async def late(request: ModelRequest) -> ModelResult:
        await hold.wait()
        return EchoModel().result(request, "late")

    slow = start(EchoModel(answers={"only": late}))
    workflow_id = await slow.submit(parse_workflow(ONE), {}, "a")
    while len(await store.events(workflow_id)) < 2:
        await asyncio.sleep(0)
    other = start(EchoModel())
    await other.recover()
    assert (await other.wait(workflow_id, "a")).state == "finished"
    hold.set()
    await slow.wait(workflow_id, "a")
    assert await terminal_events(store, workflow_id) == ["Finished"]
    while slow.running:
        await asyncio.sleep(0)


async def test_closing_leaves_workflows_unfinished_for_the_next_start(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    await runner.close()
    assert model.cancelled == ["only"]
    record = await store.workflow(workflow_id, tenant="a")
    assert record is not None
    assert record.state == "running"
    with pytest.raises(Unavailable, match="stopping"):
        await runner.submit(parse_workflow(ONE), {}, "a")
    again = start(EchoModel())
    await again.recover()
    assert (await again.wait(workflow_id, "a")).state == "finished"


async def test_cancelling_in_mid_flight_lets_the_calls_go(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"each[0].work", "each[2].work"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(CHAIN), {"topic": "bees"}, "a")
    while len(model.asked) < 4:
        await asyncio.sleep(0)
    record = await runner.cancel(workflow_id, "a")
    assert record.state == "cancelled"
    assert sorted(model.cancelled) == ["each[0].work", "each[2].work"]
    assert (await runner.cancel(workflow_id, "a")).state == "cancelled", "cancelling twice is fine"
    assert await terminal_events(store, workflow_id) == ["Cancelled"]


async def test_a_workflow_of_another_tenant_cannot_be_cancelled_or_seen(start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    for call in (runner.cancel, runner.describe, runner.wait):
        with pytest.raises(NotFound, match=workflow_id):
            await call(workflow_id, "b")
    assert runner.running == 1


async def test_a_cancel_request_that_was_stored_is_carried_out_after_a_crash(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    await runner.close()
    assert await store.append(
        workflow_id, [b'{"v":1,"event":{"type":"CancelRequested"}}'], expected_seq=2, at_s=1.0, state="cancelling"
    )
    again = start(EchoModel())
    await again.recover()
    assert (await again.wait(workflow_id, "a")).state == "cancelled"


async def test_a_refused_call_fails_the_workflow_and_releases_the_others(store: SqliteStore, start: Start) -> None:
    model = EchoModel(answers={"a": refusal("no_replica")}, hung=frozenset({"b"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(TWO), {}, "a")
    record = await runner.wait(workflow_id, "a")
    assert record.state == "failed"
    assert json.loads(record.outcome or b"") == {"error": "no_replica", "node": "a"}
    assert model.cancelled == ["b"]
    shown = await runner.describe(workflow_id, "a")
    assert (shown["error"], shown["error_node"]) == ("no_replica", "a")
    assert await terminal_events(store, workflow_id) == ["Failed"]


async def test_a_caller_with_a_defect_fails_the_node_by_name(start: Start) -> None:
    def broken(request: ModelRequest) -> ModelResult:
        raise KeyError("oops \ud800")

    runner = start(EchoModel(answers={"only": broken}))
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    record = await runner.wait(workflow_id, "a")
    assert record.state == "failed"
    assert b"KeyError" in (record.outcome or b"")


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"message": {"content": None}}]}])
async def test_a_useless_answer_fails_the_node(start: Start, answer: dict[str, Any]) -> None:
    def useless(request: ModelRequest) -> ModelResult:
        return ModelResult(call_id="c", replica_id="r", attempts=1, answer=answer)

    runner = start(EchoModel(answers={"only": useless}))
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "failed"


async def test_images_go_into_the_blob_store(store: SqliteStore, start: Start) -> None:
    png = b"\x89PNG\r\n\x1a\n" + b"pixels"

    def draw(request: ModelRequest) -> ModelResult:
        answer = {"data": [{"b64_json": base64.b64encode(png).decode()}]}
        return ModelResult(call_id="c", replica_id="r", attempts=1, answer=answer)

    runner = start(EchoModel(answers={"pic": draw}))
    spec = parse_workflow("{name: pic, nodes: {pic: {kind: image, model: sdxl, prompt: a bee}}}")
    record = await runner.wait(await runner.submit(spec, {}, "a"), "a")
    image = json.loads(record.outcome or b"")["pic"]["images"][0]
    assert image["bytes"] == len(png)
    assert await store.blob(image["sha256"], tenant="a") == ("image/png", png)
    assert await store.blob(image["sha256"], tenant="b") is None


async def test_a_deadline_that_passes_fails_the_workflow(store: SqliteStore, start: Start) -> None:
    model, clock = EchoModel(hung=frozenset({"only"})), FixedClock()
    runner = start(model, clock)
    spec = parse_workflow(ONE.replace("name: one", "name: one, deadline_s: 0.02"))
    workflow_id = await runner.submit(spec, {}, "a")
    await model.hanging.wait()
    clock.time_s += 1.0
    record = await runner.wait(workflow_id, "a")
    assert record.state == "failed"
    assert json.loads(record.outcome or b"") == {"error": "deadline", "node": None}
    assert model.cancelled == ["only"]
    assert await terminal_events(store, workflow_id) == ["Failed"]


async def test_a_deadline_that_passed_while_nobody_ran_fails_at_recovery(store: SqliteStore, start: Start) -> None:
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a", deadline_at_s=1005.0)
    await model.hanging.wait()
    assert model.asked[0].deadline_at_s == 1005.0
    await runner.close()
    late = EchoModel()
    again = start(late, FixedClock(1006.0))
    await again.recover()
    assert (await again.wait(workflow_id, "a")).state == "failed"
    assert late.asked == [], "no call is made after the deadline"


async def test_an_unreadable_workflow_is_failed_and_does_not_stop_the_others(store: SqliteStore, start: Start) -> None:
    record = WorkflowRecord(
        workflow_id="bad", tenant="a", mode="declared", kind="k", name="n", state="running", created_at_s=0.0
    )
    await store.accept(record, [b'{"v": 1, "event": {"type": "FromNowhere"}}'])
    model = EchoModel(hung=frozenset({"only"}))
    runner = start(model)
    good = await runner.submit(parse_workflow(ONE), {}, "a")
    await model.hanging.wait()
    await runner.close()
    again = start(EchoModel())
    assert await again.recover() == 1
    assert (await again.wait(good, "a")).state == "finished"
    bad = await store.workflow("bad", tenant="a")
    assert bad is not None
    assert bad.state == "failed"
    assert b"FromNowhere" in (bad.outcome or b"")


async def test_a_workflow_of_a_newer_version_is_left_alone_but_for_a_kill(store: SqliteStore, start: Start) -> None:
    record = WorkflowRecord(
        workflow_id="new", tenant="a", mode="declared", kind="k", name="n", state="running", created_at_s=0.0
    )
    await store.accept(record, [b'{"v": 99, "event": {"type": "FromTheFuture"}}'])
    runner = start(EchoModel())
    assert await runner.recover() == 0
    found = await store.workflow("new", tenant="a")
    assert found is not None
    assert (found.state, found.seq) == ("running", 1)
    with pytest.raises(WorkflowError, match="version 99, this program knows"):
        await runner.describe("new", "a")
    assert (await runner.kill("new", "a")).state == "cancelled"


async def test_transparent_workflows_are_left_to_their_clients(store: SqliteStore, start: Start) -> None:
    record = WorkflowRecord(
        workflow_id="t", tenant="a", mode="transparent", kind="k", name="n", state="running", created_at_s=0.0
    )
    await store.accept(record, [])
    runner = start(EchoModel())
    assert await runner.recover() == 0
    assert (await runner.describe("t", "a"))["nodes"] == []
    with pytest.raises(WorkflowError, match="client's own"):
        await runner.cancel("t", "a")


async def test_inputs_that_do_not_fit_are_refused_at_submission(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel())
    with pytest.raises(WorkflowError, match=r"inputs\.topic: this input has no default"):
        await runner.submit(parse_workflow(CHAIN), {}, "a")
    with pytest.raises(WorkflowError, match=r"inputs\.topik: .*did you mean 'topic'"):
        await runner.submit(parse_workflow(CHAIN), {"topik": "x"}, "a")
    assert await store.unfinished() == []


async def test_a_store_that_recovers_loses_nothing(store: SqliteStore, start: Start, tmp_path: Path) -> None:
    class FlakyStore(SqliteStore):
        """Refuses the second commit once, and once says no after it wrote."""

        commits = 0

        async def commit(self, change: Commit) -> Committed:
            self.commits += 1
            if self.commits == 2:
                raise StoreError("disk full")
            done = await super().commit(change)
            if self.commits == 4:
                raise StoreError("answer lost")
            return done

    flaky = FlakyStore(tmp_path / "swarmx.db")
    await flaky.open()
    runner = start(EchoModel(), store=flaky)
    workflow_id = await runner.submit(parse_workflow(CHAIN), {"topic": "bees"}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"
    assert await terminal_events(store, workflow_id) == ["Finished"]
    await runner.close()
    await flaky.close()


async def test_a_listener_that_raises_does_not_stop_the_workflow(start: Start) -> None:
    def listener(workflow_id: str) -> None:
        raise RuntimeError("listener")

    runner = start(EchoModel(), on_change=listener)
    workflow_id = await runner.submit(parse_workflow(ONE), {}, "a")
    assert (await runner.wait(workflow_id, "a")).state == "finished"


async def test_a_client_that_leaves_during_submission_does_not_leave_an_orphan(
    store: SqliteStore, start: Start
) -> None:
    runner = start(EchoModel())
    submission = asyncio.create_task(runner.submit(parse_workflow(ONE), {}, "a"))
    await asyncio.sleep(0)
    submission.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submission
    while not (page := await store.workflows(tenant="a", state=None, limit=1, cursor=None)).workflows:
        await asyncio.sleep(0)
    workflow_id = page.workflows[0].workflow_id
    while (await runner.wait(workflow_id, "a")).state != "finished":
        await asyncio.sleep(0)  # it is in the store a moment before it begins


async def test_many_workflows_at_once_all_end_once(store: SqliteStore, start: Start) -> None:
    runner = start(EchoModel())
    spec = parse_workflow(CHAIN)
    ids = await asyncio.gather(*(runner.submit(spec, {"topic": str(i)}, "a") for i in range(30)))
    records = await asyncio.gather(*(runner.wait(id, "a") for id in ids))
    assert {record.state for record in records} == {"finished"}
    for id in ids:
        assert await terminal_events(store, id) == ["Finished"]


def test_an_event_survives_its_bytes() -> None:
    event = Failed(error="x", path="a")
    assert decode_event(encode_event(event)) == event

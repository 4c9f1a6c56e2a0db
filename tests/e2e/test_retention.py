"""`state.keep_days` in a running server: what ended too long ago is gone for its clients, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarmx.memory.audit import LOG_NAME, read_log, verify_files
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.clock import WallClock
from swarmx.runtime.retention import DAY_S
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.wiring.state import DATABASE
from swarmx.workflows.spec import parse_workflow
from tests.contract.test_store import call_record
from tests.e2e.fleet import Http, serving, until
from tests.runtime.runners import ONE, EchoModel, FixedClock

pytestmark = pytest.mark.process

SETTINGS: dict[str, Any] = {
    "state": {"keep_days": 2},
    "server": {"drain_s": 1},
    "replicas": [{"id": "down", "model": "m", "url": "http://127.0.0.1:9"}],  # nothing here is asked of a model
}
TENANT = "default"
INSTANT = {"name": "instant", "nodes": {"a": {"kind": "tool", "function": "upper", "args": {"text": "x"}}}}


async def ran(store: SqliteStore, *, at_s: float) -> str:
    """The id of a workflow that was run to its end at that time, with a call that belongs to it."""
    runner = WorkflowRunner(store, EchoModel(), FixedClock(at_s))
    workflow_id = await runner.submit(parse_workflow(ONE), {}, TENANT)
    assert (await runner.wait(workflow_id, TENANT)).state == "finished"
    await runner.close()
    call = call_record(f"call of {workflow_id}", tenant=TENANT, workflow_id=workflow_id, ready_at_s=at_s)
    await store.record_call(call)
    return workflow_id


async def listed(http: Http) -> set[str]:
    return {row["workflow_id"] for row in (await http.get("/api/v1/workflows")).body["workflows"]}


async def test_what_ended_longer_ago_than_keep_days_is_unknown_and_younger_ones_stay(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o700)
    now_s = WallClock().now_s()
    earlier = SqliteStore(state_dir / DATABASE)
    await earlier.open()
    old = [await ran(earlier, at_s=now_s - days * DAY_S) for days in (400.0, 3.0, 2.1)]
    lately = await ran(earlier, at_s=now_s - 1.9 * DAY_S)
    await earlier.close()

    with serving(SETTINGS, tmp_path) as server:
        async with server.http() as http:
            assert await listed(http) == {*old, lately}, "the server looks a while after its start"
            today = await http.submitted(INSTANT)
            await http.ended(today)
            assert (await http.put("/api/v1/policies/routing", json={"policy": "round_robin"})).status == 200
            await until(lambda: listed(http), lambda ids: ids.isdisjoint(old))

            for workflow_id in old:
                path = f"/api/v1/workflows/{workflow_id}"
                for reply in (await http.get(path), await http.get(f"{path}/events"), await http.post(f"{path}/retry")):
                    assert (reply.status, reply.body["title"]) == (404, "Not Found")
                    assert f"there is no workflow '{workflow_id}'" in reply.body["detail"]
            assert await listed(http) == {lately, today}
            for workflow_id in (lately, today):
                assert (await http.get(f"/api/v1/workflows/{workflow_id}")).body["state"] == "finished"
            for workflow_id in (*old, lately):  # predictors still learn from the newest calls, whatever their age
                assert (await http.get(f"/api/v1/calls/call of {workflow_id}")).status == 200
            assert (await http.get("/api/v1/audit/verify")).body["sound"]
    assert "forgotten, as state.keep_days has it: 3 workflows" in server.log
    assert verify_files(server.state_dir).sound
    tools = [record.entry.tool for record in read_log(server.state_dir / LOG_NAME)]
    assert "set_routing_policy" in tools

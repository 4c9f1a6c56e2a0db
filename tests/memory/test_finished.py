from __future__ import annotations

from pathlib import Path

import msgspec

from swarmx.core.records import CallRecord
from swarmx.memory.finished import newest_finished
from swarmx.memory.sqlite import SqliteStore

RECORD = CallRecord(
    call_id="c0", tenant="t", workflow_id="", workflow_kind="", node="", role="", kind="llm", model="m",
    state="finished", attempts=1, replica_id="r", device="d", prompt_key="", prompt_bytes=9, prompt_tokens=3,
    work_done=40.0, forecast_p50=30.0, forecast_p90=60.0, forecast_source="prior", ready_at_s=0.0,
    dispatched_at_s=0.0, first_token_at_s=0.1, ended_at_s=1.0, encoding=b"\x00\xff",
)  # fmt: skip


async def test_the_newest_finished_calls_come_oldest_first(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "db")
    await store.open()
    for i in range(10):
        state = "failed" if i == 8 else "finished"
        # Recorded in the order of their ends, which is not that in which they became ready.
        await store.record_call(msgspec.structs.replace(RECORD, call_id=f"c{i}", state=state, ready_at_s=float(-i)))
    records = await newest_finished(store, 4)
    await store.close()
    assert [record.call_id for record in records] == ["c6", "c7", "c9"]
    assert records[0].encoding == b"\x00\xff"

"""The audit log on disk: durable in order, picky at the start, anchored in time."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from swarmx.core.audit import GENESIS, Head
from swarmx.core.errors import StoreError
from swarmx.memory.audit import LOG_NAME, AuditLog, read_log, verify_files
from tests.memory.logs import entry, filled, heads, opened, until


async def test_records_are_kept_in_order_with_their_time_and_chain(tmp_path: Path) -> None:
    await filled(tmp_path, 3)
    await filled_again(tmp_path)
    records = list(read_log(tmp_path / LOG_NAME))
    assert [record.seq for record in records] == [1, 2, 3, 4]
    assert [record.entry.arguments["number"] for record in records] == [1, 2, 3, 4]
    assert records[0].prev == GENESIS
    assert {record.at_s for record in records} == {1000.0}
    report = verify_files(tmp_path)
    assert report.findings == ()
    assert report.head == report.last == heads(tmp_path)[-1]


async def filled_again(folder: Path) -> None:
    async with opened(folder) as log:
        assert log.head.seq == 3
        assert await log.write(entry(4)) == 4


async def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    await filled(tmp_path, 1)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"audit.jsonl": 0o600, "audit.heads": 0o600}


async def test_many_writers_share_syncs_and_each_gets_its_own_number(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        numbers = await asyncio.gather(*(log.write(entry(number)) for number in range(1000)))
        assert sorted(numbers) == list(range(1, 1001))
        written = {record.seq: record.entry.arguments["number"] for record in read_log(tmp_path / LOG_NAME)}
        assert written == {seq: number for number, seq in enumerate(numbers)}
    assert verify_files(tmp_path).findings == ()


async def test_a_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await log.write(entry(1))
        assert [record.seq for record in read_log(tmp_path / LOG_NAME)] == [1]
        report = verify_files(tmp_path)
        assert report.sound
        assert report.records == 1


async def test_a_cancelled_writer_leaves_the_others_and_the_chain_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        tasks = [asyncio.create_task(log.write(entry(number))) for number in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await log.write(entry(99)) == 21
    assert verify_files(tmp_path).findings == ()


async def test_the_tail_comes_oldest_first_from_memory_and_from_the_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await asyncio.gather(*(log.write(entry(number)) for number in range(1, 1501)))
        for before in (None, 1501, 1500, 700, 2, 1, 0, 9999):
            end = 1501 if before is None else min(max(before, 1), 1501)
            for limit in (1, 10, 1000):
                found = await log.tail(limit=limit, before=before)
                assert [record.seq for record in found] == list(range(max(1, end - limit), end))
        with pytest.raises(StoreError, match="1 to 1000"):
            await log.tail(limit=0)
    async with opened(tmp_path) as log:
        assert [record.seq for record in await log.tail(limit=3)] == [1498, 1499, 1500]
        assert [record.seq for record in await log.tail(limit=2, before=3)] == [1, 2]


async def test_the_first_head_comes_before_the_first_record(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_bytes(b"torn")
    async with opened(tmp_path) as log:
        assert log.head.seq == 1
        assert [head.seq for head in heads(tmp_path)] == [0, 1]


async def test_heads_are_kept_at_the_start_after_some_records_and_at_the_end(tmp_path: Path) -> None:
    heard: list[Head] = []
    async with opened(tmp_path, on_head=heard.append, anchor_records=10, anchor_s=1e6) as log:
        assert [head.seq for head in heads(tmp_path)] == [0]
        for number in range(25):
            await log.write(entry(number))
        await until(lambda: len(heard) == 3)
        assert [head.seq for head in heads(tmp_path)] == [0, 10, 20]
    assert [head.seq for head in heads(tmp_path)] == [0, 10, 20, 25]
    assert heard == heads(tmp_path)
    async with opened(tmp_path):
        pass
    assert [head.seq for head in heads(tmp_path)] == [0, 10, 20, 25]


async def test_a_head_is_kept_soon_after_a_lone_record(tmp_path: Path) -> None:
    heard: list[Head] = []
    async with opened(tmp_path, on_head=heard.append, anchor_s=0.02) as log:
        await log.write(entry(1))
        await until(lambda: [head.seq for head in heard] == [0, 1])
        assert log.head == heard[-1] == heads(tmp_path)[-1]


async def test_open_intents_are_closed_as_interrupted_at_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        first = await log.write(entry(kind="intent", tool="scale_model", proposal_id="p1", effect="irreversible"))
        second = await log.write(entry(kind="intent"))
        await log.write(entry(kind="outcome", intent_seq=second, outcome="applied"))
    assert [record.seq for record in verify_files(tmp_path).open_intents] == [first]
    async with opened(tmp_path) as log:
        (record,) = await log.tail(limit=1)
        assert record.seq == 4
        assert record.entry.outcome == "interrupted"
        assert record.entry.intent_seq == first
        assert (record.entry.tool, record.entry.proposal_id) == ("scale_model", "p1")
        assert record.entry.effect == "irreversible"
        assert heads(tmp_path)[-1].seq == 4
    async with opened(tmp_path) as log:
        assert log.head.seq == 4


async def test_two_servers_do_not_share_a_log(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        with pytest.raises(StoreError, match=r"another process writes .*audit"):
            await AuditLog(tmp_path / LOG_NAME, clock=lambda: 1.0).open()
        with pytest.raises(StoreError, match="already open"):
            await log.open()
        assert await log.write(entry(1)) == 1


async def test_a_log_that_cannot_be_opened_says_which(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/audit\.jsonl cannot be opened"):
        await AuditLog(tmp_path / "file" / LOG_NAME, clock=lambda: 1.0).open()
    assert verify_files(tmp_path / "nowhere").records == 0


async def test_a_closed_log_says_so_and_opens_again(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / LOG_NAME, clock=lambda: 1.0)
    await log.open()
    await log.write(entry(1))
    await log.close()
    await log.close()
    for use in (log.write(entry(2)), log.tail(limit=1)):
        with pytest.raises(StoreError, match="not open"):
            await use
    await log.open()
    assert await log.write(entry(2)) == 2
    assert [record.seq for record in await log.tail(limit=9)] == [1, 2]
    await log.close()


async def test_the_check_is_quiet_while_a_server_writes(tmp_path: Path) -> None:
    async with opened(tmp_path, anchor_records=5) as log:
        writing = asyncio.gather(*(log.write(entry(number, detail="x" * 500)) for number in range(3000)))
        reports = []
        while not writing.done():
            reports.append(await asyncio.to_thread(verify_files, tmp_path))
        await writing
    assert reports
    assert all(report.sound for report in reports)


async def test_heads_that_cannot_be_written_are_a_warning_and_records_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path, anchor_records=2, anchor_s=1e6) as log:
        log._heads.close()  # what a broken disk under the second file looks like
        with caplog.at_level(logging.WARNING):
            for number in range(3):
                await log.write(entry(number))
            await until(lambda: "head of the audit log could not be kept" in caplog.text)
        assert await log.write(entry(9)) == 4


_WRITER = """
import asyncio, sys
from swarmx.core.audit import AuditEntry
from swarmx.core.control import Actor
from swarmx.core.errors import StoreError
from swarmx.memory.audit import AuditLog
ops = Actor(type="key", name="ops", role="operator")
async def main():
    log = AuditLog(sys.argv[1], clock=lambda: 1.0)
    await log.open()
    async def write(count):
        for _ in range(count):
            entry = AuditEntry(kind="note", actor=ops, via="cli", tool="no_op", detail="x" * 300)
            print(await log.write(entry), flush=True)
    try:
        await asyncio.gather(*(write(100_000) for _ in range(8)))
    except StoreError as error:
        print(error)
asyncio.run(main())
"""


@pytest.mark.process
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _WRITER, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    acknowledged = 0
    while acknowledged < 500:
        acknowledged = max(acknowledged, int(await process.stdout.readline()))
    process.kill()
    rest = (await process.stdout.read()).split()
    await process.wait()
    acknowledged = max([acknowledged, *map(int, rest[:-1])])
    assert verify_files(tmp_path).sound
    async with opened(tmp_path) as log:
        assert log.head.seq >= acknowledged
        assert await log.write(entry(1)) == log.head.seq
    assert verify_files(tmp_path).findings == ()


@pytest.mark.process
async def test_a_full_disk_is_an_error_and_leaves_a_sound_log(tmp_path: Path) -> None:
    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    path = tmp_path / LOG_NAME
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(path)], capture_output=True, text=True, check=True, preexec_fn=small_disk
    )
    assert "took no record" in done.stdout
    assert verify_files(tmp_path).findings == ()
    async with opened(tmp_path) as log:
        await log.write(entry(1))


async def test_lines_are_json_that_other_programs_read(tmp_path: Path) -> None:
    await filled(tmp_path, 1)
    (line,) = (tmp_path / LOG_NAME).read_text(encoding="utf-8").splitlines()
    fields = json.loads(line)
    assert list(fields) == ["at_s", "entry", "hash", "prev", "seq"]
    assert fields["entry"]["arguments"] == {"number": 1}

"""The audit log on disk: durable in order, picky at the start, anchored in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.audit import GENESIS, MADE_ROOM, AuditEntry, AuditRecord, Head, head_of, line_of, seal
from swarmx.core.control import Actor
from swarmx.core.errors import StoreError
from swarmx.core.ports import AuditTrail
from swarmx.memory.audit import LOG_NAME, AuditLog, export_log, read_log, verify_files

OPERATOR = Actor(type="key", name="ops", role="operator")


def entry(number: int = 0, **changes: Any) -> AuditEntry:
    made = AuditEntry(kind="note", actor=OPERATOR, via="cli", tool="no_op", arguments={"number": number})
    return msgspec.structs.replace(made, **changes)


@contextlib.asynccontextmanager
async def opened(folder: Path, **options: Any) -> AsyncIterator[AuditLog]:
    log = AuditLog(folder / LOG_NAME, clock=lambda: 1000.0, **options)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


async def filled(folder: Path, count: int) -> None:
    async with opened(folder) as log:
        trail: AuditTrail = log
        for number in range(1, count + 1):
            assert await trail.write(entry(number)) == number


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def heads(folder: Path) -> list[Head]:
    return [msgspec.json.decode(line, type=Head) for line in (folder / "audit.heads").read_bytes().splitlines()]


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


async def test_the_tail_does_not_pass_on_what_was_changed_underneath(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await asyncio.gather(*(log.write(entry(number)) for number in range(1500)))
        path = tmp_path / LOG_NAME
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"#")
        with pytest.raises(StoreError, match=r"record 1 .*not as it was written"):
            await log.tail(limit=5, before=6)
        assert not verify_files(tmp_path).sound


async def test_the_tail_does_not_pass_on_records_that_changed_places(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        await asyncio.gather(*(log.write(entry(number)) for number in range(1500)))
        path = tmp_path / LOG_NAME
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines[1]) == len(lines[2])
        path.write_bytes(b"".join(swapped(lines)))
        with pytest.raises(StoreError, match="record 2 "):
            await log.tail(limit=5, before=6)


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


async def test_a_torn_last_line_is_cut_off_and_noted(tmp_path: Path) -> None:
    await filled(tmp_path, 2)
    path = tmp_path / LOG_NAME
    with path.open("ab") as file:
        file.write(b'{"at_s":10')
    with (tmp_path / "audit.heads").open("ab") as file:
        file.write(b'{"at')
    report = verify_files(tmp_path)
    assert [finding.verdict for finding in report.findings] == ["torn"]
    assert report.sound
    assert [record.seq for record in read_log(path)] == [1, 2]
    assert list(export_log(path)) == path.read_bytes().splitlines(keepends=True)[:2]
    async with opened(tmp_path) as log:
        (record,) = await log.tail(limit=1)
        assert (record.seq, record.entry.kind) == (3, "note")
        assert "10 bytes" in record.entry.detail
        assert await log.write(entry(1)) == 4
    assert verify_files(tmp_path).findings == ()
    assert heads(tmp_path)[-1].seq == 4


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def rewritten(lines: list[bytes]) -> list[bytes]:
    forged, prev = [], GENESIS
    for seq in range(1, len(lines) + 1):
        record = seal(entry(99), seq=seq, at_s=1.0, prev=prev)
        prev = record.hash
        forged.append(line_of(record))
    return forged


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "altered": lambda lines: [lines[0].replace(b"no_op", b"no_up"), *lines[1:]],
    "unreadable": lambda lines: [lines[0].replace(b"{", b"<", 1), *lines[1:]],
    "missing": lambda lines: [lines[0], *lines[2:]],
    "reordered": swapped,
    "repeated": lambda lines: [*lines, lines[1]],
    "rewritten": rewritten,
    "tail_cut": lambda lines: lines[:-2],
    "gone": lambda lines: [],
}


@pytest.mark.parametrize("verdict", DAMAGE)
async def test_a_damaged_log_is_not_continued_and_not_touched(tmp_path: Path, verdict: str) -> None:
    await filled(tmp_path, 6)
    path = tmp_path / LOG_NAME
    damaged = b"".join(DAMAGE[verdict](path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(damaged)
    assert [finding.verdict for finding in verify_files(tmp_path).findings] == [verdict]
    log = AuditLog(path, clock=lambda: 1000.0)
    with pytest.raises(StoreError, match=rf"audit\.jsonl.* {verdict}.*swarmx audit verify.*move them away"):
        await log.open()
    assert path.read_bytes() == damaged
    with pytest.raises(StoreError, match="not open"):
        await log.write(entry(1))
    path.unlink()
    (tmp_path / "audit.heads").unlink()
    async with opened(tmp_path) as fresh:
        assert await fresh.write(entry(1)) == 1


async def test_a_missing_log_or_missing_heads_are_noticed(tmp_path: Path) -> None:
    await filled(tmp_path, 3)
    path, heads_path = tmp_path / LOG_NAME, tmp_path / "audit.heads"
    kept = heads_path.read_bytes()
    heads_path.unlink()
    assert [finding.verdict for finding in verify_files(tmp_path).findings] == ["unanchored"]
    with pytest.raises(StoreError, match="unanchored"):
        await AuditLog(path, clock=lambda: 1.0).open()
    heads_path.write_bytes(kept)
    path.unlink()
    assert [finding.verdict for finding in verify_files(tmp_path).findings] == ["gone"]
    with pytest.raises(StoreError, match="gone"):
        await AuditLog(path, clock=lambda: 1.0).open()


async def test_damaged_heads_are_noticed(tmp_path: Path) -> None:
    await filled(tmp_path, 3)
    heads_path = tmp_path / "audit.heads"
    heads_path.write_bytes(b"never mind\n" + heads_path.read_bytes())
    (finding,) = verify_files(tmp_path).findings
    assert finding.verdict == "unreadable"
    assert "line 1 of audit.heads" in finding.detail
    with pytest.raises(StoreError, match=r"line 1 of audit\.heads"):
        await AuditLog(tmp_path / LOG_NAME, clock=lambda: 1.0).open()


async def test_a_rewrite_of_both_files_is_found_by_a_head_from_elsewhere(tmp_path: Path) -> None:
    heard: list[Head] = []
    async with opened(tmp_path, on_head=heard.append) as log:
        for number in range(5):
            await log.write(entry(number))
    for path in tmp_path.iterdir():
        path.unlink()
    await filled(tmp_path, 7)
    assert verify_files(tmp_path).sound
    assert not verify_files(tmp_path, heard).sound


async def test_a_full_file_is_followed_by_another_and_all_are_one_log(tmp_path: Path) -> None:
    small = {"file_bytes": 2000}
    async with opened(tmp_path, **small) as log:
        for number in range(1, 41):
            assert await log.write(entry(number)) == number
        names = sorted(path.name for path in tmp_path.glob("audit*.jsonl"))
        assert len(names) > 3
        assert names[-1] == LOG_NAME
        for before, limit in ((None, 40), (3, 2), (30, 25), (41, 3), (40, 39)):
            stop = before or 41
            tail = await log.tail(limit=limit, before=before)
            assert [record.seq for record in tail] == list(range(max(1, stop - limit), stop))
    sizes = [path.stat().st_size for path in tmp_path.glob("audit-*.jsonl")]
    assert max(sizes) < 2500
    async with opened(tmp_path, **small) as log:
        await asyncio.gather(*(log.write(entry(number)) for number in range(41, 1241)))
        for before, limit in ((100, 80), (41, 1000), (1240, 1000)):  # what memory does not have comes from the files
            tail = await log.tail(limit=limit, before=before)
            assert [record.seq for record in tail] == list(range(max(1, before - limit), before))
    records = list(read_log(tmp_path / LOG_NAME))
    assert [record.entry.arguments["number"] for record in records] == list(range(1, 1241))
    assert len(b"".join(export_log(tmp_path / LOG_NAME)).splitlines()) == 1240
    report = verify_files(tmp_path, [Head(seq=7, hash=records[6].hash, at_s=0.0)])
    assert (report.sound, report.records, report.last.seq, report.start.seq) == (True, 1240, 1240, 0)


@pytest.mark.parametrize("damage", ["deleted", "cut", "changed", "renamed"])
async def test_damage_in_a_full_file_is_found(tmp_path: Path, damage: str) -> None:
    async with opened(tmp_path, file_bytes=2000) as log:
        for number in range(30):
            await log.write(entry(number))
    full = sorted(tmp_path.glob("audit-*.jsonl"))
    match damage:
        case "deleted":
            full[0].unlink()
        case "cut":
            full[1].write_bytes(full[1].read_bytes()[:-40])
        case "changed":
            full[1].write_bytes(full[1].read_bytes().replace(b'"no_op"', b'"no_po"', 1))
        case _:
            full[0].rename(full[0].with_name("audit-999999999999.jsonl"))
    assert not verify_files(tmp_path).sound
    with pytest.raises(StoreError, match="not as it was written"):
        async with opened(tmp_path):
            pass


async def test_the_oldest_files_make_room_and_the_log_says_so(tmp_path: Path) -> None:
    small = {"file_bytes": 2000, "keep_bytes": 5000}
    async with opened(tmp_path, **small) as log:
        for number in range(100):
            await log.write(entry(number))
        old = await log.tail(limit=1, before=5)
        assert old == [], "they are not there any more"
        assert [record.seq for record in await log.tail(limit=3)] == list(range(log.head.seq - 2, log.head.seq + 1))
    assert sum(path.stat().st_size for path in tmp_path.glob("audit*.jsonl")) < 9000
    report = verify_files(tmp_path)
    assert report.sound, report.findings
    assert 0 < report.start.seq < report.last.seq
    records = list(read_log(tmp_path / LOG_NAME))
    assert [record.seq for record in records] == list(range(report.start.seq + 1, report.last.seq + 1))
    notes = [record.entry for record in records if record.entry.tool == MADE_ROOM]
    assert notes[-1].arguments == {"seq": report.start.seq, "hash": report.start.hash}
    async with opened(tmp_path, **small) as log:
        assert await log.write(entry(0)) == report.last.seq + 1
    assert verify_files(tmp_path).sound


async def test_files_that_nobody_says_made_room_are_missing(tmp_path: Path) -> None:
    async with opened(tmp_path, file_bytes=2000) as log:
        for number in range(30):
            await log.write(entry(number))
    first = sorted(tmp_path.glob("audit-*.jsonl"))[0]
    last = msgspec.json.decode(first.read_bytes().splitlines()[-1], type=AuditRecord)
    first.unlink()
    (tmp_path / "audit.start").write_bytes(msgspec.json.encode(head_of(last)))
    (finding,) = verify_files(tmp_path).findings
    assert (finding.verdict, "no record says that they made room" in finding.detail) == ("missing", True)


async def test_a_crash_between_two_files_loses_nothing(tmp_path: Path) -> None:
    """After the full one has its name, and after a head of where the log begins, before the files are deleted."""
    await filled(tmp_path, 5)
    (tmp_path / LOG_NAME).rename(tmp_path / "audit-000000000005.jsonl")
    async with opened(tmp_path) as log:
        assert await log.write(entry(6)) == 6
    assert verify_files(tmp_path).sound
    async with opened(tmp_path, file_bytes=1, keep_bytes=1) as log:
        await log.write(entry(7))
        assert not (tmp_path / "audit-000000000005.jsonl").exists()
    report = verify_files(tmp_path)
    assert report.sound
    (tmp_path / "audit-000000000002.jsonl").write_bytes(b"left over\n")
    assert verify_files(tmp_path).sound, "what ends before the log begins does not count"
    async with opened(tmp_path) as log:
        await log.write(entry(8))
    assert verify_files(tmp_path).last.seq == report.last.seq + 1


async def test_the_check_is_quiet_while_files_come_and_go(tmp_path: Path) -> None:
    async with opened(tmp_path, file_bytes=1500, keep_bytes=4000) as log:
        writing = asyncio.create_task(write_many(log, 120))
        while not writing.done():
            report = await asyncio.to_thread(verify_files, tmp_path)
            assert report.sound, report.findings
        await writing


async def write_many(log: AuditLog, count: int) -> None:
    for number in range(count):
        await log.write(entry(number))


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


async def test_reading_a_damaged_log_stops_at_the_damage(tmp_path: Path) -> None:
    await filled(tmp_path, 3)
    path = tmp_path / LOG_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"?\n", lines[2]]))
    records = read_log(path)
    assert next(records).seq == 1
    with pytest.raises(StoreError, match=r"line 2 .* unreadable"):
        next(records)


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

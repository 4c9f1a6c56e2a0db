"""An audit log of several files: they are one log, the oldest make room, and damage in any of them is found."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from swarmx.core.audit import MADE_ROOM, AuditRecord, Head, head_of
from swarmx.core.errors import StoreError
from swarmx.memory.audit import LOG_NAME, export_log, read_log, verify_files
from tests.memory.logs import entry, filled, opened, write_many


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

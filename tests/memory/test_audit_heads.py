"""Heads of full files make room: one stays for each, and damage is found as before."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from swarmx.core.audit import EMPTY
from swarmx.memory.audit import LOG_NAME, AuditLog, read_log, verify_files
from swarmx.memory.audit_heads import read_heads
from tests.memory.logs import entry, heads, opened, write_many

SMALL = {"file_bytes": 2000, "anchor_records": 1}


async def settled(log: AuditLog, folder: Path) -> None:
    """Heads come a little after the records."""
    async with asyncio.timeout(60):
        while read_heads(folder / "audit.heads")[0][-1].seq < log.head.seq:
            await asyncio.sleep(0.005)


def ends(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("audit-*.jsonl"))


async def test_the_last_head_of_each_full_file_stays(tmp_path: Path) -> None:
    async with opened(tmp_path, **SMALL) as log:
        await write_many(log, 60)
        await settled(log, tmp_path)
        kept = [head.seq for head in heads(tmp_path)]
    full = ends(tmp_path)
    assert len(full) > 5
    assert kept[: len(full)] == full
    assert kept[len(full) :] == list(range(full[-1] + 1, 61)), "the newest file has all of its heads"
    report = verify_files(tmp_path)
    assert (report.sound, report.head) == (True, report.last)
    async with opened(tmp_path, **SMALL) as log:
        await write_many(log, 20)
    assert verify_files(tmp_path).sound
    assert len(heads(tmp_path)) < 30


async def test_there_are_no_heads_of_records_that_made_room(tmp_path: Path) -> None:
    async with opened(tmp_path, keep_bytes=1, **SMALL) as log:
        await write_many(log, 60)
        await settled(log, tmp_path)
    report = verify_files(tmp_path)
    assert report.sound, report.findings
    assert min(head.seq for head in heads(tmp_path)) >= report.start.seq > 0


async def test_each_record_of_a_full_file_is_still_vouched_for(tmp_path: Path) -> None:
    async with opened(tmp_path, **SMALL) as log:
        await write_many(log, 30)
    records = list(read_log(tmp_path / LOG_NAME))
    second = sorted(tmp_path.glob("audit-*.jsonl"))[1]
    lines = second.read_bytes().splitlines(keepends=True)
    second.write_bytes(b"".join([lines[0].replace(b'"no_op"', b'"no_po"'), *lines[1:]]))
    report = verify_files(tmp_path)
    assert {finding.verdict for finding in report.findings} == {"altered"}
    assert len(records) == 30


@pytest.mark.parametrize("damage", ["nonsense", "a head of another log", "a head less"])
async def test_what_somebody_did_to_the_heads_meanwhile_is_not_wiped_out(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.heads"
    async with opened(tmp_path, **SMALL) as log:
        await log.write(entry(1))
        await settled(log, tmp_path)
        lines = path.read_bytes().splitlines(keepends=True)
        forged = lines[-1].replace(b'"seq":1', b'"seq":2')
        now = {"nonsense": [*lines, b"x\n"], "a head of another log": [*lines, forged], "a head less": lines[1:]}[
            damage
        ]
        with path.open("r+b") as file:  # the same file: the server goes on writing behind it
            file.truncate(0)
            file.write(b"".join(now))
        with caplog.at_level(logging.WARNING):
            await write_many(log, 30)
            await settled(log, tmp_path)
        left = path.read_bytes()
    assert left.startswith(b"".join(now))
    assert "not as it was written" in caplog.text
    assert verify_files(tmp_path).sound == (damage == "a head less"), "fewer heads prove less, but nothing wrong"


async def test_a_log_that_never_filled_a_file_keeps_all_heads(tmp_path: Path) -> None:
    async with opened(tmp_path, anchor_records=1) as log:
        for number in range(5):
            await log.write(entry(number))
            await settled(log, tmp_path)
    assert [head.seq for head in heads(tmp_path)] == [EMPTY.seq, 1, 2, 3, 4, 5]

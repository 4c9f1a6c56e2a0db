"""An audit log that somebody or a crash has changed: what is found, and what is not continued."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from swarmx.core.audit import GENESIS, Head, line_of, seal
from swarmx.core.errors import StoreError
from swarmx.memory.audit import LOG_NAME, AuditLog, export_log, read_log, verify_files
from tests.memory.logs import entry, filled, heads, opened


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


async def test_reading_a_damaged_log_stops_at_the_damage(tmp_path: Path) -> None:
    await filled(tmp_path, 3)
    path = tmp_path / LOG_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"?\n", lines[2]]))
    records = read_log(path)
    assert next(records).seq == 1
    with pytest.raises(StoreError, match=r"line 2 .* unreadable"):
        next(records)

"""Tasks that live as long as the server: one that dies is heard of, and takes nobody with it."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from swarmx.runtime.journal import FileJournal
from swarmx.wiring.tasks import flushed, running_task


async def test_a_task_that_dies_is_logged_at_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def dies() -> None:
        raise ValueError("a bad day")

    async with running_task(dies(), name="records"):
        async with asyncio.timeout(60.0):
            while not caplog.records:
                await asyncio.sleep(0)
        (record,) = caplog.records
        assert record.getMessage() == "records ended: the server goes on without it"
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], ValueError)


async def test_a_task_ends_with_its_block_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ended = False

    async def waits() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    async def does_its_work() -> None:
        return None

    with caplog.at_level(logging.INFO):
        async with running_task(waits(), name="desk"), running_task(does_its_work(), name="memory"):
            await asyncio.sleep(0)
    assert ended
    assert caplog.records == []


async def test_a_journal_on_a_full_disk_is_told_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = FileJournal(tmp_path / "a.jsonl", {})
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), journal._file.fileno())
    async with flushed(journal):
        async with asyncio.timeout(60.0):
            while not caplog.records:
                await asyncio.sleep(0.05)
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" /")[0] for line in told] == ["the journal", "the end of the journal"]
    assert all("No space left" in line for line in told)

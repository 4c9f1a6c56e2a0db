"""The vector memory falls back by name, and the array's file stays small and sound."""

from __future__ import annotations

import logging
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from swarmx.core.errors import StoreError
from swarmx.memory.vectors import ARRAY_FILE, CHROMA_FOLDER, ArrayVectors, open_vectors


async def used(folder: Path) -> str:
    """Open, add, find; the name of what was opened."""
    memory = await open_vectors(folder, 2)
    await memory.add("a", [1.0, 0.0], {"n": 1})
    found = await memory.nearest([1.0, 0.0], 5)
    await memory.close()
    assert [key for key, _, _ in found] == ["a"]
    return memory.name


async def test_chroma_is_used_when_it_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert await used(tmp_path / "vectors") == "chroma"
    assert [path.name for path in (tmp_path / "vectors").iterdir()] == [CHROMA_FOLDER]
    assert caplog.records == []


async def test_without_chroma_an_array_in_a_file_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "chromadb", None)
    assert await used(tmp_path) == "array"
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "chromadb cannot be imported" in warning.getMessage()
    again = await open_vectors(tmp_path, 2)
    assert await again.nearest([1.0, 0.0], 1) == [("a", 1.0, {"n": 1})]
    await again.close()


async def test_in_a_folder_that_cannot_be_used_nothing_is_kept_and_all_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "file"
    folder.write_text("in the way")
    assert await used(folder) == "array"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "until this process ends" in caplog.text
    assert folder.read_text() == "in the way"


async def test_a_damaged_chroma_database_is_left_alone_and_an_array_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert await used(tmp_path) == "chroma"
    database = tmp_path / CHROMA_FOLDER / "chroma.sqlite3"
    damaged = b"not a database " * 1000
    database.write_bytes(damaged)
    assert await used(tmp_path) == "array"
    assert "not a database" in caplog.text
    assert "move it away" in caplog.text
    assert database.read_bytes() == damaged
    assert (tmp_path / ARRAY_FILE).exists()


async def test_a_damaged_array_file_is_an_error_that_says_where(tmp_path: Path) -> None:
    memory = ArrayVectors(tmp_path, 2)
    await memory.open()
    await memory.add("a", [1.0, 0.0], {})
    await memory.close()
    path = tmp_path / ARRAY_FILE
    path.write_bytes(path.read_bytes() + b"?\n")
    with pytest.raises(StoreError, match=r"line 2 of .*vectors\.jsonl"):
        await memory.open()


async def test_an_incomplete_last_line_is_forgotten(tmp_path: Path) -> None:
    memory = ArrayVectors(tmp_path, 2)
    for key, tail in (("a", b'{"key"'), ("b", b"")):
        await memory.open()
        await memory.add(key, [1.0, 0.0], {})
        await memory.close()
        with (tmp_path / ARRAY_FILE).open("ab") as file:
            file.write(tail)
    await memory.open()
    assert [key for key, _, _ in await memory.nearest([1.0, 0.0], 9)] == ["a", "b"]
    await memory.close()


async def test_the_file_does_not_grow_without_end(tmp_path: Path) -> None:
    memory = ArrayVectors(tmp_path, 2, capacity=4)
    await memory.open()
    path = tmp_path / ARRAY_FILE
    files = []
    for number in range(100):
        await memory.add(f"k{number}", [1.0, float(number)], {"n": number})
        assert len(path.read_bytes().splitlines()) <= 8
        files.append(path.stat().st_ino)
    assert sum(before != after for before, after in pairwise(files)) == 23  # after 8, 12, 16 ... lines
    await memory.close()
    await memory.open()
    found = await memory.nearest([1.0, 0.0], 9)
    assert [(key, facts) for key, _, facts in found] == [(f"k{n}", {"n": n}) for n in (96, 97, 98, 99)]
    await memory.close()

"""Vector memory: nearest vectors in one numpy matrix, and the choice between that and Chroma."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.core.control import Facts
from swarmx.core.errors import StoreError
from swarmx.memory.chroma import ChromaVectors
from swarmx.memory.facts import checked_count, checked_facts, checked_word, unit_vector
from swarmx.memory.growing_file import GrowingFile, lines_of

log = logging.getLogger(__name__)

T = TypeVar("T")

CAPACITY = 4096
CHROMA_FOLDER = "chroma"
ARRAY_FILE = "vectors.jsonl"


async def open_vectors(folder: Path, dimension: int) -> ChromaVectors | ArrayVectors:
    """An open vector memory in the folder: Chroma, else a file, else this process's own memory, each said in the log.

    `name` tells which it is. Vectors of one are not seen by the other.
    """
    chroma = ChromaVectors(folder / CHROMA_FOLDER, dimension)
    try:
        await chroma.open()
    except StoreError as error:
        log.warning("vector memory without Chroma, in %s: %s", folder / ARRAY_FILE, error)
    else:
        return chroma
    array = ArrayVectors(folder, dimension)
    try:
        await array.open()
    except StoreError as error:
        log.warning("vector memory only until this process ends: %s", error)
        array = ArrayVectors(None, dimension)
        await array.open()
    return array


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    vector: list[float]
    facts: Facts


class ArrayVectors:
    """The VectorMemory port in a matrix; `folder` keeps it in a file of JSON lines, None forgets it at the end.

    Past `capacity` the oldest are dropped. All work is done on one thread, in its order.
    """

    name = "array"

    def __init__(self, folder: Path | None, dimension: int, *, capacity: int = CAPACITY) -> None:
        self._folder = folder
        self._dimension = dimension
        self._capacity = capacity
        self._matrix = np.zeros((capacity, dimension), dtype=np.float32)
        self._rows: dict[str, tuple[int, Facts]] = {}  # oldest first: row in the matrix, facts
        self._lines = 0
        self._file: GrowingFile | None = None
        self._thread: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Read what was kept. Raises StoreError: the folder cannot be used, or the file is damaged."""
        if self._thread is not None:
            raise StoreError("the vector memory is already open")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vectors")
        try:
            await self._do(self._load)
        except StoreError:
            await self.close()
            raise

    async def close(self) -> None:
        """Closing twice is fine."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await asyncio.to_thread(thread.shutdown)
            if self._file is not None:
                self._file.close()

    async def add(self, key: str, vector: Sequence[float], facts: Facts) -> None:
        """Remember the vector, in place of an older one of this key. Raises StoreError."""
        row = unit_vector(vector, self._dimension)
        line = _Line(key=checked_word(key), vector=row.tolist(), facts=checked_facts(facts))
        await self._do(lambda: self._add(line))

    async def nearest(self, vector: Sequence[float], count: int) -> list[tuple[str, float, Facts]]:
        """Up to `count` of (key, cosine similarity, facts), best first. Raises StoreError."""
        wanted, row = checked_count(count), unit_vector(vector, self._dimension)
        return await self._do(lambda: self._nearest(row, wanted))

    async def _do(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise StoreError("the vector memory is not open; open it first")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            raise StoreError(f"the vector memory cannot be written: {error}; check the disk and its space") from error

    def _load(self) -> None:
        self._rows, self._lines = {}, 0
        if self._folder is None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = GrowingFile(self._folder / ARRAY_FILE)
        self._file.open()
        whole = 0
        for line in lines_of(self._file.path):
            if line.endswith(b"\n"):
                self._keep(self._read(line))
                self._lines += 1
                whole += len(line)
        self._file.cut(whole)  # a crash can leave an incomplete last line

    def _read(self, line: bytes) -> _Line:
        try:
            read = msgspec.json.decode(line, type=_Line)
            unit_vector(read.vector, self._dimension)
        except (msgspec.MsgspecError, ValueError, StoreError) as error:
            raise StoreError(
                f"line {self._lines + 1} of {self._folder}/{ARRAY_FILE} is no vector of {self._dimension} numbers: "
                f"{error}; move the file away to start with an empty memory"
            ) from error
        return read

    def _add(self, line: _Line) -> None:
        if self._file is not None:
            if self._lines >= 2 * self._capacity:
                self._file.replace(b"".join(_encoded(self._line(known)) for known in self._rows))
                self._lines = len(self._rows)
            self._file.append(_encoded(line))
            self._lines += 1
        self._keep(line)

    def _keep(self, line: _Line) -> None:
        old = self._rows.pop(line.key, None)
        if old is not None:
            row = old[0]
        elif len(self._rows) < self._capacity:
            row = len(self._rows)
        else:
            row = self._rows.pop(next(iter(self._rows)))[0]
        self._matrix[row] = line.vector
        self._rows[line.key] = (row, line.facts)

    def _nearest(self, vector: NDArray[np.float32], count: int) -> list[tuple[str, float, Facts]]:
        similarities = np.clip(self._matrix @ vector, -1.0, 1.0)
        best = sorted(self._rows.items(), key=lambda item: -similarities[item[1][0]])[:count]
        return [(key, float(similarities[row]), dict(facts)) for key, (row, facts) in best]

    def _line(self, key: str) -> _Line:
        row, facts = self._rows[key]
        return _Line(key=key, vector=self._matrix[row].tolist(), facts=facts)


def _encoded(line: _Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"

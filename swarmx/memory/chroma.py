"""Vector memory in Chroma, in this process and on this disk: our own vectors, no server, no telemetry."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarmx.core.control import Facts
from swarmx.core.errors import StoreError
from swarmx.memory.facts import checked_count, checked_facts, checked_word, unit_vector

T = TypeVar("T")

_COLLECTION = "episodes"
_CAPACITY = 4096
# As many candidates as there are vectors: a search is as good as exact, and still takes milliseconds.
_INDEX = {"space": "cosine", "ef_construction": 200, "ef_search": _CAPACITY}


class ChromaVectors:
    """The VectorMemory port on a Chroma database in `folder`, which only its owner can read.

    Past `capacity` the oldest are dropped. All work is done on one thread, in its order. Importing Chroma takes a
    second or more, so that happens there too.
    """

    name = "chroma"

    def __init__(
        self, folder: Path, dimension: int, *, collection: str = _COLLECTION, capacity: int = _CAPACITY
    ) -> None:
        self._folder = folder
        self._dimension = dimension
        self._collection_name = collection
        self._capacity = capacity
        self._client: Any = None
        self._collection: Any = None
        self._keys: dict[str, None] = {}  # oldest first
        self._number = 0  # of the last vector that was added; tells which is older
        self._thread: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Open or create the database. Raises StoreError: no Chroma, no such folder, damaged, or not our own."""
        if self._thread is not None:
            raise StoreError(f"the vector memory in {self._folder} is already open")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chroma")
        try:
            await self._do(self._load)
        except StoreError:
            await self.close()
            raise

    async def close(self) -> None:
        """Closing twice is fine."""
        if self._thread is not None:
            try:
                await self._do(self._unload)
            finally:
                thread, self._thread = self._thread, None
                await asyncio.to_thread(thread.shutdown)

    async def add(self, key: str, vector: Sequence[float], facts: Facts) -> None:
        """Remember the vector, in place of an older one of this key. Raises StoreError."""
        word, row, kept = checked_word(key), unit_vector(vector, self._dimension), checked_facts(facts)
        await self._do(lambda: self._add(word, row, kept))

    async def nearest(self, vector: Sequence[float], count: int) -> list[tuple[str, float, Facts]]:
        """Up to `count` of (key, cosine similarity, facts), best first. Raises StoreError."""
        wanted, row = checked_count(count), unit_vector(vector, self._dimension)
        return await self._do(lambda: self._nearest(row, wanted))

    async def _do(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            raise StoreError(f"the vector memory in {self._folder} is not open; open it first")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, work)

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except StoreError:
            raise
        except BaseException as error:  # a panic in Chroma's native part is no Exception
            raise StoreError(
                f"Chroma in {self._folder} failed ({type(error).__name__}: {error}); check the folder, or move it "
                "away to start with an empty memory"
            ) from error

    def _load(self) -> None:
        try:
            chromadb = importlib.import_module("chromadb")
            config = importlib.import_module("chromadb.config")
        except ImportError as error:
            raise StoreError(f"chromadb cannot be imported ({error}); install it to keep vectors in Chroma") from error
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        # Every setting is given, so that no .env file and no variable of the environment can switch something on.
        settings = {key: field.default for key, field in config.Settings.model_fields.items()}
        settings |= {"anonymized_telemetry": False}
        self._client = chromadb.PersistentClient(
            path=str(self._folder), settings=config.Settings(_env_file=None, **settings)
        )
        self._collection = self._own_collection()
        kept = self._collection.get(include=["metadatas"])  # also loads the index: damage shows here
        numbers = {key: int(extra["number"]) for key, extra in zip(kept["ids"], kept["metadatas"], strict=True)}
        self._keys = dict.fromkeys(sorted(numbers, key=lambda key: numbers[key]))
        self._number = max(numbers.values(), default=0)

    def _unload(self) -> None:
        client, self._client, self._collection = self._client, None, None
        if client is not None:
            client.close()

    def _own_collection(self) -> Any:
        """The collection, made if need be. An embedding function would see texts, so one that names one is refused."""
        errors = importlib.import_module("chromadb.errors")
        name = self._collection_name
        try:
            collection = self._client.get_collection(name, embedding_function=None)
        except errors.NotFoundError:
            return self._client.create_collection(
                name,
                embedding_function=None,
                configuration={"hnsw": dict(_INDEX)},
                metadata={"dimension": self._dimension},
            )
        stored = collection.configuration_json
        function = stored.get("embedding_function") or {"type": "legacy"}  # what Chroma writes for None
        space = (stored.get("hnsw") or {}).get("space")
        dimension = (collection.metadata or {}).get("dimension")
        if function.get("type") != "legacy":
            problem = f"names the embedding function {function.get('name')!r}, SwarmX brings its own vectors"
        elif space != "cosine":
            problem = f"compares by {space!r}, 'cosine' was expected"
        elif dimension != self._dimension:
            problem = f"holds vectors of {dimension} numbers, {self._dimension} were expected"
        else:
            return collection
        raise StoreError(
            f"the collection {name!r} in {self._folder} {problem}; move the folder away to start with an empty memory"
        )

    def _add(self, key: str, row: NDArray[np.float32], facts: Facts) -> None:
        self._number += 1
        # Chroma merges new metadata into old, one text of all facts replaces the old one as a whole.
        extra = {"number": self._number, "facts": msgspec.json.encode(facts).decode()}
        self._collection.upsert(ids=[key], embeddings=[row], metadatas=[extra])
        self._keys.pop(key, None)
        self._keys[key] = None
        while len(self._keys) > self._capacity:
            oldest = next(iter(self._keys))
            self._collection.delete(ids=[oldest])
            del self._keys[oldest]

    def _nearest(self, row: NDArray[np.float32], count: int) -> list[tuple[str, float, Facts]]:
        found = self._collection.query(
            query_embeddings=[row], n_results=min(count, self._capacity), include=["metadatas", "distances"]
        )
        columns = zip(found["ids"][0], found["distances"][0], found["metadatas"][0], strict=True)
        return [
            (key, min(1.0, max(-1.0, 1.0 - distance)), msgspec.json.decode(extra["facts"], type=Facts))
            for key, distance, extra in columns
        ]

"""Chroma runs inside the process: no server, no network, no embedding function, whatever the environment says."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import chromadb
import pytest
from chromadb.config import Settings

from swarmx.core.errors import StoreError
from swarmx.memory.chroma import ChromaVectors

_USER = """
import asyncio, json, os, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
from swarmx.memory.chroma import ChromaVectors
assert "chromadb" not in sys.modules
async def main():
    memory = ChromaVectors(Path(sys.argv[1]), 2)
    for _ in range(3):
        await memory.open()
        await memory.add("a", [1.0, 0.0], {})
        assert len(await memory.nearest([1.0, 0.0], 3)) == 1
        sockets = {os.readlink(fd.path)[8:-1] for fd in os.scandir("/proc/self/fd")
                   if os.path.islink(fd.path) and os.readlink(fd.path).startswith("socket:")}
        await memory.close()
    network = {line.split()[9] for kind in ("tcp", "tcp6", "udp", "udp6")
               for line in Path("/proc/self/net", kind).read_text().splitlines()[1:]}
    paths = {line.split()[6]: line.split()[7:] for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]}
    unnamed = {inode for inode, path in paths.items() if not path}
    print(json.dumps({
        "network": sorted(sockets & network),
        "others": sorted(sockets - unnamed),
        "modules": [name for name in sys.modules if name.startswith(("chromadb.server", "chromadb.app", "uvicorn"))],
    }))
asyncio.run(main())
"""


@pytest.mark.process
def test_no_socket_to_anywhere_is_opened_and_no_server_imported(tmp_path: Path) -> None:
    """A pair of sockets without a name, which the native part uses to wake itself, leads nowhere."""
    done = subprocess.run([sys.executable, "-c", _USER, str(tmp_path / "c")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"network": [], "others": [], "modules": []}
    assert done.stderr == ""


@pytest.mark.process
def test_the_environment_cannot_switch_anything_on(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "CHROMA_OTEL_GRANULARITY=all\nCHROMA_OTEL_COLLECTION_ENDPOINT=http://192.0.2.1:4317\n"
    )
    surroundings = {
        "ANONYMIZED_TELEMETRY": "true",
        "CHROMA_API_IMPL": "chromadb.api.fastapi.FastAPI",
        "CHROMA_SERVER_HOST": "192.0.2.1",
        "CHROMA_OTEL_GRANULARITY": "all",
        "CHROMA_OTEL_COLLECTION_ENDPOINT": "http://192.0.2.1:4317",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _USER, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=surroundings,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"network": [], "others": [], "modules": []}


async def test_only_the_owner_can_enter_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "chroma"
    folder.mkdir(mode=0o755)
    memory = ChromaVectors(folder, 2)
    await memory.open()
    await memory.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "embedding function 'default'"),
        ({"embedding_function": None}, "compares by 'l2'"),
        ({"embedding_function": None, "configuration": {"hnsw": {"space": "cosine"}}}, "vectors of None numbers"),
    ],
)
async def test_a_collection_that_is_not_our_own_is_refused(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    client = chromadb.PersistentClient(path=str(tmp_path), settings=Settings(anonymized_telemetry=False))
    client.create_collection("episodes", **options)
    client.close()
    memory = ChromaVectors(tmp_path, 2)
    with pytest.raises(StoreError, match=problem):
        await memory.open()
    other = ChromaVectors(tmp_path, 2, collection="ours")
    await other.open()
    await other.close()


async def test_a_damaged_index_is_found_at_the_start(tmp_path: Path) -> None:
    client = chromadb.PersistentClient(path=str(tmp_path), settings=Settings(anonymized_telemetry=False))
    collection = client.create_collection(
        "episodes",
        embedding_function=None,
        configuration={"hnsw": {"space": "cosine", "batch_size": 5, "sync_threshold": 10}},
        metadata={"dimension": 2},
    )
    collection.upsert(
        ids=[f"k{number}" for number in range(30)],
        embeddings=[[1.0, float(number)] for number in range(30)],
        metadatas=[{"number": number, "facts": "{}"} for number in range(30)],
    )
    client.close()
    memory = ChromaVectors(tmp_path, 2)
    await memory.open()
    assert [key for key, _, _ in await memory.nearest([1.0, 0.0], 2)] == ["k0", "k1"]
    await memory.close()
    files = list(tmp_path.glob("*/*.bin"))
    assert files
    for file in files:
        file.write_bytes(b"zz")
    with pytest.raises(StoreError, match=r"Chroma in .* failed .*move it away"):
        await memory.open()

"""Starts a whole SwarmX for the demo: the server process and its replicas, on loopback, in a folder of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from swarmx.client import Api
from swarmx.core.errors import ReplicaError

# Three models on three device types, twelve replicas: the demo's arrivals keep them busy, but not hopeless.
EMULATED: tuple[Mapping[str, Any], ...] = (
    {"model": "qwen3-8b", "device": "l40s", "count": 2, "size_class": "8b"},
    {"model": "qwen3-8b", "device": "a100", "count": 1, "size_class": "8b"},
    {"model": "qwen3-8b", "device": "h100", "count": 1, "size_class": "8b"},
    {"model": "qwen3-32b", "device": "l40s", "count": 1, "size_class": "32b"},
    {"model": "qwen3-32b", "device": "a100", "count": 2, "size_class": "32b"},
    {"model": "qwen3-32b", "device": "h100", "count": 1, "size_class": "32b"},
    {"model": "sdxl", "device": "l40s", "count": 2, "kind": "image"},
    {"model": "sdxl", "device": "a100", "count": 1, "kind": "image"},
    {"model": "sdxl", "device": "h100", "count": 1, "kind": "image"},
)
MODELS = {"small": "qwen3-8b", "large": "qwen3-32b", "image": "sdxl"}
_START_S = 180.0


@asynccontextmanager
async def server(settings: Mapping[str, Any], folder: Path, *, start_s: float = _START_S) -> AsyncIterator[Api]:
    """A running server and a client for it. Raises ReplicaError, with the server's last words, if it does not start."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "swarmx.toml"
    config.write_text(_toml(settings))
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "swarmx", "--state-dir", str(folder / "state")),
            *("up", "--config", str(config), "--port", "0", "--exit-with-parent"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    try:
        async with await _connected(process, folder, start_s) as api:
            yield api
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 20.0)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _connected(process: asyncio.subprocess.Process, folder: Path, start_s: float) -> Api:
    """Wait until every replica takes calls."""
    log_path = folder / "server.log"
    try:
        async with asyncio.timeout(start_s):
            line = await process.stdout.readline() if process.stdout is not None else b""
            if not line:
                raise ReplicaError(f"the server did not start; its last words:\n{_tail(log_path)}")
            api = Api(json.loads(line)["url"], (folder / "state" / "admin.token").read_text())
            try:
                await _all_ready(api)
            except BaseException:
                await api.close()
                raise
            return api
    except TimeoutError:
        raise ReplicaError(f"the fleet was not ready after {start_s:g} s; its log ends:\n{_tail(log_path)}") from None


async def _all_ready(api: Api) -> None:
    while True:
        rows = (await api.get("/api/v1/replicas"))["replicas"]
        if rows and all(row["state"] == "ready" for row in rows):
            return
        await asyncio.sleep(0.2)


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-12:])


def _toml(settings: Mapping[str, Any]) -> str:
    """Just enough TOML for tables and arrays of tables."""
    lines: list[str] = []
    for name, value in settings.items():
        for table in value if isinstance(value, list | tuple) else [value]:
            lines.append(f"[[{name}]]" if isinstance(value, list | tuple) else f"[{name}]")
            lines += [f"{key} = {_value(item)}" for key, item in table.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """Scalars are written as JSON writes them, mappings as inline tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)

"""From nothing to a running server and back to nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.fleet import DEADLINE_S, alive, all_ready, children, launch, peers, serving, static, until, up

pytestmark = pytest.mark.process

HEAVY = {"torch", "transformers", "scipy", "pyarrow", "polars", "matplotlib", "pandas", "vllm", "ray", "openai"}
EMULATED = {
    "server": {"drain_s": 1},
    "emulation": {"time_scale": 20.0},
    "emulated": [{"model": "qwen3-8b", "device": "h100"}, {"model": "sdxl", "device": "l40s", "kind": "image"}],
}
NOWHERE = {"server": {"drain_s": 1}, "replicas": [{"id": "a", "model": "m", "url": "http://127.0.0.1:9"}]}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello?"}]}


def imported(module: str) -> set[str]:
    """The top-level modules that importing `module` brings in."""
    script = f"import json, sys, {module}; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def open_port(port: int) -> bool:
    with closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "module", ["swarmx.cli", "swarmx.wiring", "swarmx.serve", "swarmx.providers.emulated.__main__"]
)
def test_nothing_heavy_is_imported(module: str) -> None:
    assert not imported(module) & HEAVY


def test_the_gateway_cannot_read_what_the_emulator_will_answer() -> None:
    script = "import sys, swarmx.serve; print('swarmx.providers.emulated.truth' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_asking_for_help_imports_no_server() -> None:
    assert not imported("swarmx.cli") & {"fastapi", "uvicorn", "uvloop", "prometheus_client"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_after_a_signal_nothing_is_left_running(tmp_path: Path, number: int) -> None:
    server = up(EMULATED, tmp_path)
    async with server.http() as http:
        await all_ready(http)
        urls = [server.url, *(row["url"] for row in (await http.replicas()).values())]
    ports = [int(url.rsplit(":", 1)[1]) for url in urls]
    pids = [server.process.pid, *children(server.process.pid)]
    assert len(pids) == len(ports) == 3
    assert all(open_port(port) for port in ports)
    server.process.send_signal(number)
    assert server.gone() == 0
    assert not [pid for pid in pids if alive(pid)]
    assert not [port for port in ports if open_port(port)]
    assert "Traceback" not in server.log


async def test_a_stopped_server_has_written_everything_down(tmp_path: Path) -> None:
    async with peers(a="fine") as found:
        with serving({"server": {"drain_s": 1}, "replicas": [static("a", "m", found["a"])]}, tmp_path) as server:
            async with server.http() as http:
                await all_ready(http)
                replies = [await http.post("/v1/chat/completions", json=CHAT) for _ in "abc"]
            assert server.stop() == 0
        (journal,) = (server.state_dir / "journals").glob("*.jsonl")
        assert journal.read_text().endswith("\n")
        assert journal.read_text().count('"type":"CallFinished"') == 3
        with serving({"server": {"drain_s": 1}, "replicas": [static("a", "m", found["a"])]}, tmp_path) as server:
            async with server.http() as http:
                for reply in replies:
                    assert (await http.get(f"/api/v1/calls/{reply.headers['x-swarmx-call-id']}")).status == 200


async def test_a_call_in_progress_is_answered_before_the_server_stops(tmp_path: Path) -> None:
    async with peers(a="hang") as found:
        settings = {"server": {"drain_s": 60}, "replicas": [static("a", "m", found["a"])]}
        with serving(settings, tmp_path) as server:
            async with server.http() as http:
                await all_ready(http)
                task = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
                await until(http.replicas, lambda rows: rows["a"]["in_flight"] == 1)
                server.process.terminate()

                async def refuses() -> bool:
                    return not open_port(int(server.url.rsplit(":", 1)[1]))

                await until(refuses, bool)
                found["a"].release.set()
                assert (await task).status == 200
            assert await asyncio.to_thread(server.gone) == 0


async def test_a_call_that_takes_too_long_does_not_keep_a_server_alive(tmp_path: Path) -> None:
    async with peers(a="hang") as found:
        settings = {"server": {"drain_s": 1}, "replicas": [static("a", "m", found["a"])]}
        with serving(settings, tmp_path) as server:
            async with server.http() as http:
                await all_ready(http)
                task = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
                await until(http.replicas, lambda rows: rows["a"]["in_flight"] == 1)
                assert await asyncio.to_thread(server.stop) == 0
                await asyncio.wait({task})
                assert task.exception() is not None or task.result().status >= 500

        async def running() -> int:
            return found["a"].running

        await until(running, lambda count: count == 0)


async def test_a_server_ends_with_its_parent(tmp_path: Path) -> None:
    server = up(EMULATED, tmp_path)
    pids = [server.process.pid, *children(server.process.pid)]
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.gone() == 0
    assert not [pid for pid in pids if alive(pid)]


async def test_a_server_that_is_killed_leaves_no_replicas(tmp_path: Path) -> None:
    server = up(EMULATED, tmp_path)
    pids = list(children(server.process.pid))
    assert len(pids) == 2
    server.kill()

    async def left() -> list[int]:
        return [pid for pid in pids if alive(pid)]

    await until(left, lambda pids: not pids)


async def test_a_server_that_is_stopped_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    server = launch(EMULATED, tmp_path)

    async def begun() -> list[int]:
        return list(children(server.process.pid))

    pids = await until(begun, bool)
    assert server.stop() == 0
    assert not [pid for pid in pids if alive(pid)]
    assert "Traceback" not in server.log


def test_an_occupied_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        server = launch(NOWHERE, tmp_path, port=port)
        assert server.gone() == 1
    assert f"Error: cannot listen on 127.0.0.1:{port}: Address already in use." in server.log
    assert "Choose another with --port" in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"emulated": [{"model": "qwen3-8b", "device": "gtx"}]}, "is profiled on"),
        ({"emulated": [{"model": "gpt-9", "device": "h100"}]}, "models are"),
        ({"replicas": [{"id": "a", "model": "m", "url": "http://127.0.0.1:9", "profile": "gpt-9"}]}, "profile 'gpt-9'"),
        ({"server": {"host": "no.such.host.invalid"}, **{"replicas": NOWHERE["replicas"]}}, "cannot listen on"),
        ({"emulated": [{"model": "sdxl", "device": "h100"}]}, "serves images"),
        ({}, "there are no replicas"),
    ],
)
def test_settings_that_cannot_work_end_the_start_with_one_sentence(
    tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    server = launch(settings, tmp_path)
    assert server.gone() == 1
    assert said in server.log
    assert "Traceback" not in server.log


def test_a_database_that_is_none_ends_the_start_with_one_sentence(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "swarmx.db").write_bytes(b"this is no database" * 100)
    server = launch(NOWHERE, tmp_path)
    assert server.gone() == 1
    assert "swarmx.db cannot be opened" in server.log
    assert "Traceback" not in server.log


def test_what_a_server_keeps_is_private(tmp_path: Path) -> None:
    with serving(NOWHERE, tmp_path) as server:
        assert stat.S_IMODE(server.state_dir.stat().st_mode) == 0o700
        files = [path for path in server.state_dir.rglob("*") if path.is_file()]
        assert {"admin.token", "keys.json", "swarmx.db"} <= {path.name for path in files}
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_second_server_on_the_same_folder_does_not_start(tmp_path: Path) -> None:
    with serving(NOWHERE, tmp_path):
        second = launch(NOWHERE, tmp_path)
        assert second.gone() == 1
        assert "another SwarmX runs on" in second.log


def test_a_second_start_keeps_the_keys_of_the_first(tmp_path: Path) -> None:
    with serving(NOWHERE, tmp_path) as server:
        token = server.token
    with serving(NOWHERE, tmp_path) as server:
        assert server.token == token
    assert len(list((server.state_dir / "journals").iterdir())) == 2


async def test_a_server_is_up_soon_although_its_replicas_are_not(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with serving(NOWHERE, tmp_path) as server:
        assert time.monotonic() - started_s < DEADLINE_S
        async with server.http() as http:
            assert (await http.get("/healthz", token="")).status == 200
            assert (await http.get("/readyz", token="")).status == 503

"""How real servers are started, bound, watched and ended; a small server stands in for vLLM, the processes are real."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import EngineOrder, ReplicaGroup
from swarmx.providers import process as module
from swarmx.providers.process import CPU_PROFILE, ProcessProvider, VllmServer
from tests.e2e.fleet import alive, children

pytestmark = pytest.mark.process

# An API server with a worker in its process group, as vLLM has them.
SERVER = """
import http.server, os, signal, subprocess, sys
model, name, port, *more = sys.argv[1:]
print("cores", os.environ.get("SWARMX_VLLM_CPUS"), *more, flush=True)
if os.path.exists(model + "/broken"):
    sys.exit("this model is broken")
if os.path.exists(model + "/stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen(["sleep", "600"])
print("worker", worker.pid, flush=True)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if os.path.exists(model + "/loading") else 200)
        self.end_headers()

http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Health).serve_forever()
"""
GROUP = ReplicaGroup(
    group_id="m-cpu",
    model="m",
    kind="llm",
    device="cpu",
    provider="process",
    profile=msgspec.structs.replace(CPU_PROFILE, model="m"),
    min_replicas=0,
    max_replicas=4,
    limit=4,
    start_s=1.0,
)


@pytest.fixture
async def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    """A folder with a model, which the small server serves instead of vLLM."""
    (tmp_path / "server.py").write_text(SERVER)
    script = tmp_path / "serve.sh"
    script.write_text(f'exec {sys.executable} {tmp_path}/server.py "$@"\n')
    monkeypatch.setattr(module, "SERVE", script)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = set(children(os.getpid()))
    yield folder
    assert set(children(os.getpid())) == before


def worker_in(log: Path) -> int:
    return int(log.read_text().split("worker ")[1].split()[0])


async def ended(pid: int) -> None:
    async with asyncio.timeout(60):
        while alive(pid):
            await asyncio.sleep(0.01)


async def test_a_server_answers_from_start_to_stop_and_takes_its_workers_along(model: Path, tmp_path: Path) -> None:
    server = VllmServer(model_dir=model, name="m", log=tmp_path / "logs" / "m.log", cores=[0, 1])
    url = await server.start()
    async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
        assert response.status == 200
    assert "cores 0,1" in server.last_words()
    worker = worker_in(tmp_path / "logs" / "m.log")
    assert alive(worker)
    waiting = asyncio.create_task(server.wait())
    await server.stop()
    assert await waiting == -signal.SIGTERM
    await ended(worker)
    await server.stop()


async def test_without_cores_the_script_decides(model: Path, tmp_path: Path) -> None:
    server = VllmServer(model_dir=model, name="m", log=tmp_path / "m.log")
    await server.start()
    assert "cores None" in server.last_words()
    await server.stop()


async def test_a_server_that_is_killed_is_noticed_and_its_workers_end(model: Path, tmp_path: Path) -> None:
    server = VllmServer(model_dir=model, name="m", log=tmp_path / "m.log")
    before = set(children(os.getpid()))
    await server.start()
    (pid,) = set(children(os.getpid())) - before
    waiting = asyncio.create_task(server.wait())
    os.kill(pid, signal.SIGKILL)
    assert await waiting == -signal.SIGKILL
    assert await server.wait() == -signal.SIGKILL
    await ended(worker_in(tmp_path / "m.log"))
    await server.start()
    await server.stop()


async def test_a_server_that_ignores_the_request_to_end_is_killed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STOP_PATIENCE_S", 0.2)
    (model / "stubborn").touch()
    server = VllmServer(model_dir=model, name="m", log=tmp_path / "m.log")
    await server.start()
    await server.stop()
    assert await server.wait() == -signal.SIGKILL


async def test_a_server_that_is_never_healthy_is_given_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_START_S", 1.0)
    (model / "loading").touch()
    server = VllmServer(model_dir=model, name="m", log=tmp_path / "m.log")
    with pytest.raises(ReplicaError, match=r"not healthy after 1 s; its log ends:"):
        await server.start()


async def test_a_server_that_dies_is_quoted(model: Path, tmp_path: Path) -> None:
    (model / "broken").touch()
    server = VllmServer(model_dir=model, name="m", log=tmp_path / "m.log")
    with pytest.raises(ReplicaError, match=r"vLLM m ended with 1; its log ends:\ncores None\nthis model is broken"):
        await server.start()


async def test_a_start_that_is_called_off_leaves_nothing_running(model: Path, tmp_path: Path) -> None:
    (model / "loading").touch()
    log = tmp_path / "m.log"
    task = asyncio.create_task(VllmServer(model_dir=model, name="m", log=log).start())
    while not (log.exists() and "worker" in log.read_text()):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ended(worker_in(log))


async def test_a_server_is_started_once_at_a_time_and_ends_only_after_its_start(model: Path, tmp_path: Path) -> None:
    server = VllmServer(model_dir=model, name="m", log=tmp_path / "m.log")
    with pytest.raises(ReplicaError, match="never started"):
        await server.wait()
    await server.stop()
    await server.start()
    with pytest.raises(ReplicaError, match="running already"):
        await server.start()
    await server.stop()


async def test_servers_share_the_cores(model: Path, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    provider = ProcessProvider(models={"m-cpu": model}, logs=tmp_path / "logs")

    def core_of(replica_id: str) -> int:
        return int((tmp_path / "logs" / f"{replica_id}.log").read_text().split()[1])

    await asyncio.gather(*(provider.deploy(f"r{number}", GROUP) for number in range(len(cores))))
    assert sorted(core_of(f"r{number}") for number in range(len(cores))) == cores
    freed = core_of("r0")
    await provider.retire("r0")
    await provider.deploy("next", GROUP)
    assert core_of("next") == freed
    await provider.stop()


@pytest.mark.parametrize(
    ("order", "arguments", "priorities"),
    [("arrival", [], "ignored"), ("priority", ["--scheduling-policy", "priority"], "low_first")],
)
async def test_a_server_is_told_in_which_order_to_serve(
    model: Path, tmp_path: Path, order: EngineOrder, arguments: list[str], priorities: str
) -> None:
    provider = ProcessProvider(models={"m-cpu": model}, logs=tmp_path / "logs")
    replica = await provider.deploy("r", msgspec.structs.replace(GROUP, engine_order=order))
    assert replica.priorities == priorities
    said, *_ = (tmp_path / "logs" / "r.log").read_text().splitlines()
    assert said.split()[2:] == arguments
    await provider.stop()


async def test_a_server_ends_when_its_parent_is_killed(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "m.log"
    script = (
        "import asyncio, pathlib\n"
        "from swarmx.providers import process\n"
        f"process.SERVE = pathlib.Path({str(module.SERVE)!r})\n"
        "async def main():\n"
        f"    server = process.VllmServer(model_dir=pathlib.Path({str(model)!r}), name='m',"
        f" log=pathlib.Path({str(log)!r}))\n"
        "    await server.start()\n"
        "    print('up', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    assert await parent.stdout.readline() == b"up\n"
    (api_server,) = children(parent.pid)
    parent.kill()
    await parent.wait()
    await ended(api_server)
    os.kill(worker_in(log), signal.SIGKILL)  # the worker of the stand-in is nobody's child now


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        ProcessProvider(models={"m": tmp_path}, logs=tmp_path)


def test_without_a_checkout_there_is_nothing_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SERVE", tmp_path / "serve.sh")
    with pytest.raises(ConfigError, match="started from a checkout"):
        ProcessProvider(models={"m": tmp_path}, logs=tmp_path)

"""The real server as a process, clients for it, and replicas of a test's own that misbehave on demand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from uuid import uuid4

import aiohttp
from aiohttp import web

from swarmx.core.control import Role
from swarmx.gateway.keys import Keyring

DEADLINE_S = 120.0  # the machine may be busy; only a test that fails waits this long

T = TypeVar("T")


async def until(ask: Callable[[], Awaitable[T]], holds: Callable[[T], bool], *, deadline_s: float = DEADLINE_S) -> T:
    """Ask until the answer is as wanted; AssertionError with the last answer otherwise."""
    end_s = time.monotonic() + deadline_s
    while not holds(answer := await ask()):
        assert time.monotonic() < end_s, f"not so after {deadline_s} s: {answer!r:.2000}"
        await asyncio.sleep(0.05)
    return answer


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> dict[int, str]:
    """Pids and command lines of a process's children, threads' children included."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # threads and children end while they are listed
            for child in (task / "children").read_text().split():
                found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back; `body` is decoded where it is JSON."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Http:
    """Requests to one server; `token` may differ with each."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Reply:
        """One request; a token of "" sends none. `path` may be a whole URL."""
        token = self.token if token is None else token
        own = {"authorization": f"Bearer {token}"} if token else {}
        url = path if path.startswith("http") else self.url + path
        async with self._session.request(method, url, headers={**own, **(headers or {})}, **more) as response:
            raw = await response.read()
            body = json.loads(raw) if "json" in response.content_type else raw
            return Reply(status=response.status, headers=response.headers, body=body)

    async def get(self, path: str, **more: Any) -> Reply:
        return await self.ask("GET", path, **more)

    async def post(self, path: str, **more: Any) -> Reply:
        return await self.ask("POST", path, **more)

    async def put(self, path: str, **more: Any) -> Reply:
        return await self.ask("PUT", path, **more)

    async def submitted(self, workflow: str | dict[str, Any], **inputs: Any) -> str:
        """The id of a workflow that the server accepted."""
        reply = await self.post("/api/v1/workflows", json={"workflow": workflow, "inputs": inputs})
        assert reply.status == 202, reply
        workflow_id: str = reply.body["workflow_id"]
        return workflow_id

    async def ended(self, workflow_id: str, *, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """The workflow as it is shown once it has ended."""

        async def ask() -> dict[str, Any]:
            row: dict[str, Any] = (await self.get(f"/api/v1/workflows/{workflow_id}")).body
            return row

        return await until(ask, lambda row: row["ended_at_s"] is not None, deadline_s=deadline_s)

    async def replicas(self) -> dict[str, dict[str, Any]]:
        """The rows of the list of replicas, by id."""
        return {row["replica_id"]: row for row in (await self.get("/api/v1/replicas")).body["replicas"]}

    async def call(self, call_id: str) -> dict[str, Any]:
        """The record of a call, which is written in the background once it has ended."""
        reply = await until(lambda: self.get(f"/api/v1/calls/{call_id}"), lambda reply: reply.status == 200)
        row: dict[str, Any] = reply.body
        return row

    async def engine(self, replica_id: str) -> dict[str, float]:
        """A replica's own counters, from its own /metrics: running, waiting, aborted."""
        text = (await self.get((await self.replicas())[replica_id]["url"] + "/metrics", token="")).body.decode()
        names = {"running": "vllm:num_requests_running{", "waiting": "vllm:num_requests_waiting{"}
        found = {
            short: sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
            for short, name in names.items()
        }
        aborted = [line for line in text.splitlines() if 'finished_reason="abort"' in line and "_created" not in line]
        return {**found, "aborted": sum(float(line.split()[-1]) for line in aborted)}

    async def idle(self) -> dict[str, dict[str, Any]]:
        """Wait until nothing runs, by the books and by the engines; returns the rows of the replicas."""
        rows = await until(self.replicas, lambda rows: all(row["in_flight"] == 0 for row in rows.values()))
        for name in rows:
            await until(partial(self.engine, name), lambda engine: engine["running"] + engine["waiting"] == 0)
        return rows


@dataclass(slots=True, kw_only=True)
class Server:
    """`swarmx up` as a process, with all that it leaves behind in `folder`."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str = ""

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def token(self) -> str:
        return (self.state_dir / "admin.token").read_text()

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def key(self, name: str, role: Role, tenant: str = "default") -> str:
        """A new token, as `swarmx keys add` makes it."""
        return Keyring(self.state_dir / "keys.json").add(name, role, tenant)

    def http(self, token: str | None = None) -> Http:
        return Http(self.url, self.token if token is None else token)

    def stop(self) -> int:
        """Ask the process to end and wait for it; returns its exit status."""
        self.process.terminate()
        return self.gone()

    def kill(self) -> None:
        self.process.kill()
        self.gone()

    def gone(self) -> int:
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()


def toml(settings: Mapping[str, Any]) -> str:
    """Tables and lists of tables of scalars as TOML (JSON scalars are TOML scalars)."""
    lines: list[str] = []
    for name, value in settings.items():
        for table in value if isinstance(value, list) else [value]:
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(item)}" for key, item in table.items()]
    return "\n".join(lines) + "\n"


def launch(settings: Mapping[str, Any], folder: Path, *, port: int = 0) -> Server:
    """The process, started but not yet up. A second one in the same folder continues the first one's work."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "swarmx.toml"
    config.write_text(toml({"coordinator": {"engine": "off"}, **settings}))  # its memory takes seconds to import
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "swarmx", "--state-dir", str(folder / "state")),
                *("up", "--config", str(config), "--port", str(port), "--exit-with-parent"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    return Server(process=process, folder=folder)


def up(settings: Mapping[str, Any], folder: Path) -> Server:
    """A server that listens; its emulated replicas answer, though not all may be in rotation yet."""
    server = launch(settings, folder)
    assert server.process.stdout is not None
    line = server.process.stdout.readline()
    if not line:
        server.gone()
        raise AssertionError(f"the server did not start:\n{server.log[-3000:]}")
    server.url = json.loads(line)["url"]
    return server


@contextmanager
def serving(settings: Mapping[str, Any], folder: Path) -> Iterator[Server]:
    """A server that runs as long as the block."""
    server = up(settings, folder)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


async def all_ready(http: Http, replica_ids: Sequence[str] | None = None) -> None:
    """Wait until all replicas, or those named, are in rotation."""

    def holds(rows: dict[str, dict[str, Any]]) -> bool:
        return all(rows[name]["state"] == "ready" for name in (rows if replica_ids is None else replica_ids))

    await until(http.replicas, holds)


def signal_replica(server: Server, number: signal.Signals, *, model: str, device: str) -> None:
    """Send a signal to the emulated replica of that model on that device."""
    wanted = f"--model {model} --device {device} "
    (pid,) = [pid for pid, line in children(server.process.pid).items() if wanted in line]
    os.kill(pid, number)


Mood = Literal["fine", "hang", "garbage", "not_an_answer", "unavailable", "hang_up", "break_off", "reject"]


def held_port() -> socket.socket:
    """A port of loopback that no other process is given while this is open, although nobody listens to it yet."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


@dataclass(slots=True, kw_only=True)
class Peer:
    """Somebody else's server: answers chat completions, or does what its `mood` says. It keeps its port while down."""

    mood: Mood = "fine"
    calls: int = 0
    running: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    _port: socket.socket = field(default_factory=held_port)
    _runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        port: int = self._port.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def close(self) -> None:
        """Stop, and give the port back."""
        await self.stop()
        self._port.close()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls += 1
        self.running += 1
        try:
            return await self._answer(request, stream=bool(body.get("stream")), model=body["model"])
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, *, stream: bool, model: str) -> web.StreamResponse:
        match self.mood:
            case "hang":
                await self.release.wait()
            case "garbage":
                return web.Response(text="<html>It works!</html>", content_type="text/html")
            case "not_an_answer":
                return web.json_response({"hello": "world"})
            case "unavailable":
                return web.json_response({"error": {"message": "overloaded"}}, status=503)
            case "reject":
                error = {"message": "no such thing", "type": "BadRequestError", "param": "x", "code": 400}
                return web.json_response({"error": error}, status=400)
            case "hang_up":
                assert request.transport is not None
                request.transport.close()
                await asyncio.Event().wait()  # until the closed connection cancels this handler
            case "fine" | "break_off":
                pass
        return await self._stream(request, model) if stream else await self._whole(request, model)

    async def _whole(self, request: web.Request, model: str) -> web.StreamResponse:
        message = {"role": "assistant", "content": "Hello from a peer."}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        common = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model}
        raw = json.dumps({**common, "choices": [choice], "usage": usage}).encode()
        if self.mood != "break_off":
            return web.Response(body=raw, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(raw))})
        await response.prepare(request)
        await response.write(raw[:20])
        assert request.transport is not None
        request.transport.close()
        return response

    async def _stream(self, request: web.Request, model: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
        for word in ("Hello", " from", " a", " peer."):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            await response.write(b"data: " + json.dumps({**common, "choices": [choice]}).encode() + b"\n\n")
            if self.mood == "break_off":
                assert request.transport is not None
                request.transport.close()
                return response
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def peers(**moods: Mood) -> AsyncIterator[dict[str, Peer]]:
    """One peer a name, in that mood."""
    found = {name: Peer(mood=mood) for name, mood in moods.items()}
    try:
        for peer in found.values():
            await peer.start()
        yield found
    finally:
        for peer in found.values():
            await peer.close()


def static(replica_id: str, model: str, peer: Peer) -> dict[str, Any]:
    """A `[[replicas]]` entry for a peer."""
    return {"id": replica_id, "model": model, "url": peer.url}


def refused(reply: Reply, status: int) -> dict[str, Any]:
    """The problem document of a refusal."""
    assert reply.status == status, reply
    assert reply.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "status", "detail"} <= set(reply.body)
    assert reply.body["status"] == status
    assert reply.body["detail"]
    body: dict[str, Any] = reply.body
    return body


async def honoured(http: Http, token: str) -> str:
    """The token, once the server has read the keys again."""
    await until(lambda: http.get("/v1/models", token=token), lambda reply: reply.status == 200)
    return token


@contextmanager
def a_key(server: Server, role: Role, tenant: str = "default") -> Iterator[str]:
    yield server.key(f"rest-{uuid4().hex[:10]}", role, tenant)

"""Many short lives of a real gateway under load, over a ledger of effects; and what must be true after the last."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from eval.doomed_gateway import Doom, points
from eval.promises import ONCE, Notes, Tally, answer_to, check
from swarmx.core.errors import SwarmXError
from swarmx.core.toolbox import Offer, ToolCall, ToolResult, ToolSpec
from swarmx.gateway.keys import Keyring
from swarmx.sdk import AsyncClient, Unprocessable, Workflow

SPEC = """
name: doomed
signals: {go: {timeout_s: 86400, default: {by: nobody}}}
nodes:
  plan: {kind: llm, model: m, prompt: plan, retry: {attempts: 6, backoff_s: 0.01}}
  parts: {kind: tool, function: split_lines, args: {text: "1\\n2\\n3"}}
  each:
    kind: map
    over: parts
    do: {work: {kind: llm, model: m, prompt: "{{ item }} of {{ plan.text }}", retry: {attempts: 6, backoff_s: 0}}}
  route:
    kind: branch
    cases: [{when: each | length == 3, do: {good: {kind: llm, model: m, prompt: good, retry: {attempts: 6}}}}]
    else: {do: {bad: {kind: llm, model: m, prompt: bad}}}
  late: {kind: llm, model: m, prompt: late, timeout_s: 0.25, retry: {attempts: 8, backoff_s: 0.02}}
  said: {kind: llm, model: m, prompt: "{{ signals.go.by }}", retry: {attempts: 6, backoff_s: 0.05}}
  inner: {kind: workflow, use: part, inputs: {of: "{{ said.text }}"}}
  look: {kind: tool, tool: look, args: {at: "{{ plan.text }}"}, retry: {attempts: 6, backoff_s: 0.02}}
  book: {kind: tool, tool: book, args: {what: "{{ look.text }}"}}
  sum_up: {kind: llm, model: m, prompt: "{{ route.text }}", needs: [each, late, inner, book], retry: {attempts: 6}}
workflows:
  part:
    inputs: {of: null}
    nodes: {do: {kind: llm, model: m, prompt: "{{ inputs.of }}", retry: {attempts: 6, backoff_s: 0.02}}}
"""
HOUR_S, MONTH_S = 3600.0, 30 * 86_400.0
_JUMPS = (HOUR_S, -HOUR_S, MONTH_S, -MONTH_S)
_USERS = 6
_UNAVAILABLE, _GARBAGE, _SLOW = 0.08, 0.04, 0.1  # of the engine's answers
_CANCELLED, _KILLED, _TWICE, _DEADLINE, _CONTINUED = 0.1, 0.06, 0.1, 0.1, 0.2  # of the workflows
_WRONG = 0.2  # of the lives have a wrong clock, and as many one that jumps
_PEACEFUL = 0.5  # of every fourth life is told to stop
_MOST_HITS = 150
_MOST_S = 1.5
_NAMED_S = 8.0  # by then a heartbeat has come
_KEPT_S = 86_400.0  # how long the gateway keeps a key, and waits for the signal
_DRAINED_S, _PATIENCE_S = 90.0, 3600.0
_TOKEN = "DOOMED_TOOLS_TOKEN"  # noqa: S105  # the name of a variable
_ANY = {"type": "object"}
TOOLS = Offer(
    pool="shop",
    slots=16,
    tools=[
        ToolSpec(name=name, description="", parameters=_ANY, pool="shop", timeout_s=20.0, idempotent=name != ONCE)
        for name in ("look", ONCE)
    ],
    refused={},
)


class Engine:
    """An engine, and a replica of tools, that note every call outside the gateway.

    A key that comes again gets the answer of the first time. Now and then it refuses, answers garbage or is slow.
    """

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self._ledger = os.open(folder / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._rng = rng
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/tools/call", self._tool)
        app.router.add_get("/v1/tools", self._offer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()
            os.close(self._ledger)

    async def _chat(self, request: web.Request) -> web.Response:
        key = request.headers["idempotency-key"]
        self._note(key, request.headers["x-request-id"])
        mood = self._rng.random()
        await self._think(mood)
        if mood < _UNAVAILABLE:
            return web.json_response({"error": {"message": "overloaded"}}, status=503)
        if mood < _UNAVAILABLE + _GARBAGE:
            return web.json_response({"choices": []})
        message = {"role": "assistant", "content": answer_to(key)}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _tool(self, request: web.Request) -> web.Response:
        call = msgspec.json.decode(await request.read(), type=ToolCall)
        mood = self._rng.random()
        if mood < _UNAVAILABLE:
            return web.json_response({"error": "too many calls wait"}, status=503)  # this one was not begun
        self._note(call.key, call.request_id)
        await self._think(mood)
        return web.json_response(msgspec.to_builtins(ToolResult(output={"text": answer_to(call.key)})))

    async def _offer(self, request: web.Request) -> web.Response:
        return web.json_response(msgspec.to_builtins(TOOLS))

    def _note(self, key: str, request_id: str) -> None:
        os.write(self._ledger, f"{time.time()!r} {key} {request_id}\n".encode())

    async def _think(self, mood: float) -> None:
        await asyncio.sleep(float(self._rng.uniform(0.0, 0.5 if mood > 1.0 - _SLOW else 0.01)))


@dataclass(slots=True, kw_only=True)
class Users:
    """They submit, signal, cancel, kill, follow and fork, over and over, through the client that SwarmX comes with."""

    url: str
    token: str
    notes: Notes
    rng: np.random.Generator
    leaps: int = 0  # how often the clock of the gateway went so far ahead that it forgot keys, and what it waited for
    stopping: bool = False
    doing: dict[int, str] = field(default_factory=dict)

    async def run(self, count: int) -> None:
        """Until `stopping` is set, and what they have begun has ended."""
        async with AsyncClient(self.url, self.token, patience_s=_PATIENCE_S) as client:
            await asyncio.gather(*(self._user(client, number) for number in range(count)))

    async def _user(self, client: AsyncClient, number: int) -> None:
        turn = 0
        while not self.stopping:
            turn += 1
            key = f"{number}-{turn}"
            self.doing[number] = key
            try:
                await self._turn(client, key)
            except SwarmXError as error:
                self.notes.note("wrong", key, f"{error!r}")
            del self.doing[number]

    async def _turn(self, client: AsyncClient, key: str) -> None:
        leaps = self.leaps
        workflow_id = await self._submitted(client, key)
        await asyncio.gather(self._meddle(client, workflow_id), self._signal(client, workflow_id, leaps))
        workflow = await self._ended(client, workflow_id)
        if self.rng.random() >= _CONTINUED:
            return
        if workflow.state == "finished":
            again = self._accepted(f"{key}-fork", lambda name: client.fork(workflow_id, "each[1].work", key=name))
        elif workflow.error_node is not None:
            again = self._accepted(f"{key}-retry", lambda name: client.retry(workflow_id, key=name))
        else:
            return
        workflow_id = await again
        with suppress(Unprocessable):  # it may share the signal with the first one
            await client.signal(workflow_id, "go", {"by": "a user"})
        await self._ended(client, workflow_id)

    async def _submitted(self, client: AsyncClient, key: str) -> str:
        spec = f"{SPEC}deadline_s: 7200\n" if self.rng.random() < _DEADLINE else SPEC
        return await self._accepted(key, lambda name: client.submit(spec, key=name))

    async def _accepted(self, key: str, ask: Callable[[str], Awaitable[str]]) -> str:
        """The workflow that the key brings; now and then two ask for it at once."""
        self.notes.note("sent", key)
        leaps = self.leaps
        ids = set(await asyncio.gather(*(ask(key) for _ in range(self._times()))))
        if self.leaps > leaps:
            self.notes.note("expired", key)
        elif len(ids) > 1:
            self.notes.note("wrong", key, f"brought the workflows {sorted(ids)}")
        workflow_id = ids.pop()
        self.notes.note("accepted", key, workflow_id)
        return workflow_id

    def _times(self) -> int:
        return 2 if self.rng.random() < _TWICE else 1

    async def _meddle(self, client: AsyncClient, workflow_id: str) -> None:
        chance = self.rng.random()
        await asyncio.sleep(float(self.rng.uniform(0.0, 0.05)))
        if chance < _CANCELLED + _KILLED:
            verb = client.cancel if chance < _CANCELLED else client.kill
            await asyncio.gather(*(verb(workflow_id) for _ in range(self._times())))

    async def _signal(self, client: AsyncClient, workflow_id: str, leaps: int) -> None:
        await asyncio.sleep(float(self.rng.uniform(0.0, 0.05)))
        try:
            sent = (client.signal(workflow_id, "go", {"by": "a user"}, key=workflow_id) for _ in range(self._times()))
            await asyncio.gather(*sent)
        except Unprocessable:
            if self.leaps == leaps and not (await client.get(workflow_id)).ended:
                raise

    async def _ended(self, client: AsyncClient, workflow_id: str) -> Workflow:
        """The workflow once it has ended; half of them are followed, event by event."""
        if self.rng.random() < 0.5:
            numbers = [event.seq async for event in client.events(workflow_id)]
            if numbers != list(range(1, len(numbers) + 1)):
                self.notes.note("wrong", workflow_id, f"was followed with gaps or repeats: {numbers}")
            self.notes.note("followed", workflow_id, str(len(numbers)))
        workflow = await client.wait(workflow_id)
        self.notes.note("ended", workflow_id, workflow.state)
        return workflow


_TRACEBACK = "Traceback (most recent call last)"


class Lives:
    """The gateway, one life after the other, each in the same folder on the same port, with users all the time."""

    def __init__(self, folder: Path, engine_url: str, mother: asyncio.subprocess.Process, seed: int) -> None:
        self.database = folder / "state" / "swarmx.db"
        self._folder = folder
        self._mother = mother
        self._port = _free_port()
        self._config = folder / "swarmx.toml"
        self._config.write_text(_settings(engine_url))
        (folder / "state").mkdir(mode=0o700)
        self.users = Users(
            url=f"http://127.0.0.1:{self._port}",
            token=Keyring(folder / "state" / "keys.json").add("users", "admin", "default"),
            notes=Notes(folder),
            rng=np.random.default_rng([seed, 2]),
        )
        self._clock_s = (0.0, 0.0)
        self._using = asyncio.ensure_future(self.users.run(_USERS))

    async def begin(self, **doom: Any) -> int:
        """Start the next life, of the fields of a `Doom`; returns its pid."""
        whole = Doom(
            config=str(self._config),
            state_dir=str(self._folder / "state"),
            port=self._port,
            folder=str(self._folder),
            **doom,
        )
        clock_s = (whole.clock_s, whole.clock_s + whole.jump_s)  # it reads the clock before the jump, or after it
        self.users.leaps += max(clock_s) - min(self._clock_s) > _KEPT_S
        self._clock_s = clock_s
        assert self._mother.stdin is not None
        self._mother.stdin.write(msgspec.json.encode(whole) + b"\n")
        return await self._line()

    async def end(self, pid: int, *, after_s: float, by: signal.Signals = signal.SIGKILL) -> None:
        """Wait for the life to end by itself, and end it after so long."""
        dying = asyncio.ensure_future(self._line())
        await asyncio.wait([dying], timeout=after_s)
        if not dying.done():
            os.kill(pid, by)
        status = await dying
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, by)
        with (self._folder / "lives").open("a") as file:
            file.write("killed\n" if killed else f"ended {status}\n")

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it is so. Raises TimeoutError."""
        async with asyncio.timeout(_DRAINED_S):
            while not holds():  # noqa: ASYNC110  # what it is about is in files
                await asyncio.sleep(0.05)

    @property
    def accepted(self) -> int:
        """How many workflows the users know to be accepted."""
        return len(Notes(self._folder).acknowledged)

    @property
    def log(self) -> str:
        """What all gateways have said."""
        path = self._folder / "server.log"
        return path.read_text() if path.exists() else ""

    async def finish(self, pid: int) -> Tally:
        """Let this life be the last: once the users have seen everything end it is stopped, and the books are read."""
        self.users.stopping = True
        await asyncio.wait([self._using], timeout=_DRAINED_S)
        if self._using.done():
            self._using.result()
        else:
            for doing in self.users.doing.values():
                self.users.notes.note("wrong", doing, "has not come to its end")
        await self.end(pid, after_s=0.0, by=signal.SIGTERM)
        tally = await check(self._folder, self.database, tenant="default", same_clock=False)
        before, found, defect = self.log.partition(_TRACEBACK)
        if not found:
            return tally
        told = f"a traceback is in the log: ...{before[-500:]}{found}{defect[:5000]}"
        return replace(tally, broken=[*tally.broken, told])

    async def close(self) -> None:
        """End the users, and with their mother all gateways."""
        self._using.cancel()
        await asyncio.gather(self._using, return_exceptions=True)
        self._mother.kill()
        await self._mother.wait()

    async def _line(self) -> int:
        assert self._mother.stdout is not None
        return int(await self._mother.stdout.readline())


@asynccontextmanager
async def gateways(folder: Path, seed: int) -> AsyncIterator[Lives]:
    """Lives in this folder, none begun yet, and the engine for them."""
    engine = Engine(folder, np.random.default_rng([seed, 1]))
    async with engine.serving():
        mother = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "eval.doomed_gateway"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, _TOKEN: "of the tools"},
        )
        lives = Lives(folder, engine.url, mother, seed)
        try:
            yield lives
        finally:
            await lives.close()


async def live(folder: Path, count: int, seed: int) -> Tally:
    """Have so many lives end: at each failpoint in turn, at any failpoint, at any moment, and now and then in peace."""
    rng = np.random.default_rng(seed)
    named = points()
    async with gateways(folder, seed) as lives:
        for number in range(count):
            hits, point, by, after_s = None, None, signal.SIGKILL, float(rng.uniform(0.0, _MOST_S))
            match number % 4:
                case 0:
                    hits, point = int(rng.integers(1, 4)), named[number // 4 % len(named)]
                    after_s = _NAMED_S if point == "owner.heartbeat" else 2 * _MOST_S
                case 1:
                    hits, after_s = int(rng.integers(1, _MOST_HITS)), 2 * _MOST_S
                case 3 if rng.random() < _PEACEFUL:
                    by = signal.SIGTERM
            pid = await lives.begin(hits=hits, point=point, **_wrong_clock(rng))
            await lives.end(pid, after_s=after_s, by=by)
        return await lives.finish(await lives.begin())


def _wrong_clock(rng: np.random.Generator) -> Mapping[str, float]:
    clock_s = float(rng.choice(_JUMPS)) if rng.random() < _WRONG else 0.0
    jump_s = float(rng.choice(_JUMPS)) if rng.random() < _WRONG else 0.0
    return {"clock_s": clock_s, "jump_s": jump_s, "jump_after_s": float(rng.uniform(0.3, 1.0))}


def _settings(engine_url: str) -> str:
    replicas = (f'[[replicas]]\nid = "{name}"\nmodel = "m"\nurl = "{engine_url}"\n' for name in ("a", "b"))
    tools = f'[[tools]]\nid = "shop-1"\nurl = "{engine_url}"\npool = "{TOOLS.pool}"\nslots = {TOOLS.slots}\n'
    tools += f'token_variable = "{_TOKEN}"\n'
    rest = '[coordinator]\nengine = "off"\n[server]\ndrain_s = 1\n[watch]\nevery_s = 0.2\n'
    return "\n".join([*replicas, tools, rest])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port

"""The workflows of `eval.ray_serve` in virtual time, without Ray: what the rules come to where no process is ever late.

The desk of SwarmX's Serve router as it is, over the same engines; Serve's routers as their rules, told in a few lines
each. What differs from a real run is that Serve's own path takes a constant time. Also measures what a decision costs,
by the clock (`wall`) and of its thread (`busy`), which another load of the machine moves little: to ask, and in all
that it keeps a request beyond the time for which it waits on purpose (`added`; where it waits, from when that began to
be handled which got it its place):

    python -m eval.ray_serve_virtual --out DIR [--prompts FOLDER] [--count 300] [--rate 2.2] [--seeds 3] [--hop-ms 4]
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from eval.ray_serve_plan import (
    DEVICES,
    MODEL,
    OURS,
    SLOTS,
    Asked,
    Planned,
    claims_of,
    parser_of,
    plan,
    row_of,
    seeds_of,
)
from eval.result import Row, table, write_result
from swarmx.compat.ray_serve.asked import call_from
from swarmx.compat.ray_serve.beside import Beside
from swarmx.compat.ray_serve.desk import Desk
from swarmx.compat.ray_serve.forecasts import forecasters
from swarmx.compat.ray_serve.options import read_options
from swarmx.compat.ray_serve.ticket import Seen, Ticket
from swarmx.core.batching import Engine, Request
from swarmx.core.engine import profiles

_HOP_S = 0.004  # of a request to a replica, and of its answer back, unless told otherwise
_PUSHED_S = 0.015  # until a router hears what a replica pushes
_BACKOFF_S, _MOST_BACKOFF_S = 0.025, 0.5  # Serve's, doubling


class _Selector(selectors.DefaultSelector):
    """Waits in virtual time: not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now_s += timeout or 0.0
        return super().select(0.0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing is left to do."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s

    def now_s(self) -> float:
        """As a `runtime.clock.Clock`."""
        return self._virtual.now_s


class Replica:
    """An emulated engine; it takes `SLOTS` calls at a time, and the rest has to wait elsewhere."""

    def __init__(self, number: int, time_scale: float) -> None:
        self.replica_id = f"replica-{number}"
        self.device = DEVICES[number]
        self.running = 0
        profile = profiles()[MODEL, self.device].scaled(time_scale)
        self._engine = Engine(msgspec.structs.replace(profile, max_batch=SLOTS))
        self._done: dict[str, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0

    async def call(self, prompt_tokens: int, output_tokens: int) -> None:
        """The answer takes as long as the engine takes for it."""
        loop = asyncio.get_running_loop()
        self._count += 1
        name, done = str(self._count), loop.create_future()
        self._done[name] = done
        request = Request(request_id=name, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        if not self._engine.submit(request, loop.time()):
            raise ValueError(f"a prompt of {prompt_tokens} tokens does not fit")
        self._advance()
        await done

    def _advance(self) -> None:
        loop = asyncio.get_running_loop()
        for event in self._engine.advance(loop.time()):
            if event.kind == "finished":
                self._done.pop(event.request_id).set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        at_s = self._engine.next_event_s()
        self._timer = None if at_s is None else loop.call_at(at_s + 1e-9, self._advance)


class Rule(Protocol):
    """How one router serves a request: to its end, on the replica whose device is returned."""

    async def serve(self, session: str, asked: Asked, prompt_tokens: int, output_tokens: int) -> str: ...


class Serves:
    """One of Serve's routers: who has waited longest goes to a replica that `pick` finds, once it finds one."""

    def __init__(
        self, replicas: Sequence[Replica], pick: Callable[[Sequence[Replica]], Replica | None], *, hop_s: float
    ) -> None:
        self._replicas = replicas
        self._pick = pick
        self._hop_s = hop_s
        self._waiting: deque[asyncio.Future[Replica]] = deque()
        self._tasks = 0

    async def serve(self, session: str, asked: Asked, prompt_tokens: int, output_tokens: int) -> str:
        chosen: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._waiting.append(chosen)
        if self._tasks < 2 * len(self._replicas):
            self._tasks += 1
            _keep(self._route())
        replica = await chosen
        await asyncio.sleep(self._hop_s)
        await replica.call(prompt_tokens, output_tokens)
        replica.running -= 1
        await asyncio.sleep(self._hop_s)
        return replica.device

    async def _route(self) -> None:
        backoff_s = _BACKOFF_S
        while self._waiting:
            replica = self._pick(self._replicas)
            if replica is None:
                await asyncio.sleep(backoff_s)
                backoff_s = min(_MOST_BACKOFF_S, 2.0 * backoff_s)
            elif self._waiting:
                backoff_s = _BACKOFF_S
                replica.running += 1
                self._waiting.popleft().set_result(replica)
        self._tasks -= 1


class Spent(NamedTuple):
    """Seconds, by the clock on the wall and of this thread."""

    wall_s: float
    busy_s: float

    @classmethod
    def now(cls) -> Spent:
        return cls(time.perf_counter(), time.thread_time())

    def until_now(self) -> Spent:
        now = Spent.now()
        return Spent(now.wall_s - self.wall_s, now.busy_s - self.busy_s)

    def and_then(self, other: Spent) -> Spent:
        return Spent(self.wall_s + other.wall_s, self.busy_s + other.busy_s)


class Ours:
    """The desk, used as `swarmx.compat.ray_serve.Router` uses it."""

    def __init__(
        self, replicas: Sequence[Replica], loop: VirtualLoop, options: dict[str, Any], *, hop_s: float
    ) -> None:
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self._hop_s = hop_s
        # Decisions are put on record, as in a real run, and the records kept nowhere.
        read = read_options({"workflow_idle_s": 4.0, "log_dir": "nowhere", **options})
        self.desk = Desk(
            "eval/Model", read, clock=loop, forecasters=lambda post: forecasters(read, clock=loop, post=post)
        )
        self.desk.replicas([Seen(replica_id=name, max_ongoing=SLOTS) for name in self._replicas])
        self._beside = {name: Beside(self.desk.deployment, name, clock=loop.time) for name in self._replicas}
        self.asked_s: list[Spent] = []
        self.added_s: list[Spent] = []  # until it leaves, but for the time for which it waits on purpose
        self.after_s: list[Spent] = []
        self._step = (-1.0, Spent.now())  # the virtual time of the last one, and when the first one then really began

    async def serve(self, session: str, asked: Asked, prompt_tokens: int, output_tokens: int) -> str:
        loop = asyncio.get_running_loop()
        begun = Spent.now()
        call, prompt = call_from(
            [asked],
            {},
            deployment=self.desk.deployment,
            method="__call__",
            workflow_id=session,
            workflow_kind="eval",
            session=session,
        )
        ticket = self.desk.ticket(call, prompt)
        chosen = self.desk.ask(ticket)
        self.asked_s.append(spent := begun.until_now())
        at_once = chosen.done()
        replica = self._replicas[await chosen]
        if at_once:
            self.added_s.append(spent)
        elif self._step[0] == loop.time():  # not by a timer, which is no step
            self.added_s.append(spent.and_then(self._step[1].until_now()))
        replica.running += 1
        await asyncio.sleep(self._hop_s)
        self._after(self._accepted, ticket, replica.running)
        beside = self._beside[replica.replica_id]
        served = beside.begin(float(prompt_tokens))
        self._push(beside)
        await replica.call(prompt_tokens, output_tokens)
        replica.running -= 1
        beside.end(served, float(output_tokens))
        self._push(beside)
        await asyncio.sleep(self._hop_s)
        self._after(self.desk.ended, ticket)
        self._after(self.desk.worked, ticket, float(output_tokens))
        return replica.device

    def _accepted(self, ticket: Ticket, running: int) -> None:
        self.desk.accepted(ticket)
        if ticket.replica_id is not None:
            self.desk.counted(ticket.replica_id, running)

    def _push(self, beside: Beside) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(_PUSHED_S, self._after, self.desk.heard, beside.signal(loop.time()))

    def _after(self, step: Callable[..., None], *args: Any) -> None:
        begun, at_s = Spent.now(), asyncio.get_running_loop().time()
        if at_s != self._step[0]:
            self._step = (at_s, begun)
        step(*args)
        self.after_s.append(begun.until_now())


_KEPT: set[asyncio.Task[None]] = set()


def _keep(coroutine: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(coroutine)
    _KEPT.add(task)
    task.add_done_callback(_KEPT.discard)


def _two_choices(rng: np.random.Generator) -> Callable[[Sequence[Replica]], Replica | None]:
    def pick(replicas: Sequence[Replica]) -> Replica | None:
        one, other = (replicas[i] for i in rng.choice(len(replicas), 2, replace=False))
        least = min((one, other), key=lambda replica: replica.running)
        return least if least.running < SLOTS else None

    return pick


def _least(replicas: Sequence[Replica]) -> Replica | None:
    least = min(replicas, key=lambda replica: replica.running)
    return least if least.running < SLOTS else None


def _in_turn() -> Callable[[Sequence[Replica]], Replica | None]:
    turns = 0

    def pick(replicas: Sequence[Replica]) -> Replica | None:
        nonlocal turns
        for _ in replicas:
            turns += 1
            if (replica := replicas[turns % len(replicas)]).running < SLOTS:
                return replica
        return None

    return pick


async def drive(rule: Rule, planned: Sequence[Planned]) -> tuple[list[float], dict[str, int]]:
    """The seconds that each workflow took, and calls by device."""
    devices = dict.fromkeys(DEVICES, 0)
    loop = asyncio.get_running_loop()

    async def one(number: int, workflow: Planned) -> float:
        await asyncio.sleep(workflow.at_s)
        for stage in workflow.stages:
            calls = [
                rule.serve(f"workflow-{number}", Asked(messages=messages, max_tokens=limit), prompt_tokens, work)
                for messages, prompt_tokens, work, limit in stage
            ]
            for device in await asyncio.gather(*calls):
                devices[device] += 1
        return loop.time() - workflow.at_s

    return list(await asyncio.gather(*[one(number, workflow) for number, workflow in enumerate(planned)])), devices


def measure(
    router: str,
    planned: Sequence[Planned],
    seed: int,
    time_scale: float,
    options: dict[str, Any],
    *,
    hop_s: float = _HOP_S,
) -> Row:
    """One run of one router."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(_measure(router, planned, seed, time_scale, options, hop_s))
    finally:
        loop.close()


async def _measure(
    router: str, planned: Sequence[Planned], seed: int, time_scale: float, options: dict[str, Any], hop_s: float
) -> Row:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    replicas = [Replica(number, time_scale) for number in range(len(DEVICES))]
    rule: Rule
    match router:
        case "power_of_two":
            rule = Serves(replicas, _two_choices(np.random.default_rng(seed)), hop_s=hop_s)
        case "round_robin":
            rule = Serves(replicas, _in_turn(), hop_s=hop_s)
        case "capacity_queue":
            rule = Serves(replicas, _least, hop_s=hop_s)
        case _:
            rule = Ours(replicas, loop, options, hop_s=hop_s)
    times, devices = await drive(rule, planned)
    row = row_of(router, seed, times, devices, time_scale)
    if isinstance(rule, Ours):
        for name, spent in (("", rule.asked_s), ("added_", rule.added_s), ("after_", rule.after_s)):
            for kind, index in (("wall", 0), ("busy", 1)):
                p50, p99 = np.percentile([one[index] for one in spent], (50, 99)) * 1e3
                row[f"{name}{kind}_p50_ms"], row[f"{name}{kind}_p99_ms"] = float(p50), float(p99)
        busy_s = sum(spent.busy_s for spent in (*rule.asked_s, *rule.after_s))
        row["per_call_ms"] = 1e3 * busy_s / len(rule.asked_s)  # without what is read and learnt later, by timers
        row["faults"] = rule.desk.faults
        rule.desk.close()
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every rule on the same workflows, and write the result."""
    parser = parser_of("eval.ray_serve_virtual", __doc__, ("power_of_two", "round_robin", "capacity_queue", OURS))
    parser.add_argument(
        "--options", type=msgspec.json.decode, default={}, help="request_router_kwargs of ours, as JSON"
    )
    parser.add_argument("--hop-ms", type=float, default=1e3 * _HOP_S, help="from a router to a replica, and back")
    wanted = parser.parse_args(arguments)
    rows: list[Row] = []
    for seed in seeds_of(wanted):
        planned = plan(wanted.count, wanted.rate, seed=seed, prompts=wanted.prompts)
        for router in wanted.routers:
            row = measure(router, planned, seed, wanted.time_scale, wanted.options, hop_s=wanted.hop_ms / 1e3)
            rows.append({**row, "hop_ms": wanted.hop_ms})
    print(table(rows))
    command = f"python -m eval.ray_serve_virtual --hop-ms {wanted.hop_ms:g}" + (
        " --prompts FOLDER" if wanted.prompts else ""
    )
    print(f"Written: {write_result(wanted.out, command, rows, claims_of(rows), seeds_of(wanted))}")


if __name__ == "__main__":
    main()

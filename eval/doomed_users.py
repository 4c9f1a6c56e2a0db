"""Users of doomed gateways: they submit, signal, cancel, kill, follow and fork, and note what they were told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import numpy as np

from eval.promises import Notes
from swarmx.core.errors import SwarmXError
from swarmx.sdk import AsyncClient, Conflict, Unprocessable, Workflow

SPEC = """
name: doomed
limits: {retries: 200}
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
  polish:
    kind: loop
    max_iterations: 3
    until: judge.text < "8"  # half of all answers
    do:
      draw: {kind: image, model: p, prompt: "{{ plan.text }} {{ iteration }}", retry: {attempts: 6, backoff_s: 0.01}}
      judge: {kind: llm, model: m, prompt: "{{ draw.images[0].sha256 }}", retry: {attempts: 6, backoff_s: 0.01}}
  helper:
    kind: agent
    model: m
    prompt: help
    tools: [look, book]
    functions: [upper]
    workflows: [part]
    schema: {type: object, properties: {said: {type: string}}, required: [said]}
    max_steps: 4
    retry: {attempts: 6, backoff_s: 0.01}
  late: {kind: llm, model: m, prompt: late, timeout_s: 0.5, retry: {attempts: 8, backoff_s: 0.02}}
  said: {kind: llm, model: m, prompt: "{{ signals.go.by }}", retry: {attempts: 6, backoff_s: 0.05}}
  inner: {kind: workflow, use: part, inputs: {of: "{{ said.text }}"}}
  look: {kind: tool, tool: look, args: {at: "{{ plan.text }}"}, retry: {attempts: 6, backoff_s: 0.02}}
  book: {kind: tool, tool: book, args: {what: "{{ look.text }}"}}
  all: {kind: join, of: [polish, helper, inner]}
  sum_up: {kind: llm, model: m, prompt: "{{ route.text }}", needs: [each, late, book, all], retry: {attempts: 6}}
workflows:
  part:
    inputs: {of: null}
    nodes: {do: {kind: llm, model: m, prompt: "{{ inputs.of }}", retry: {attempts: 6, backoff_s: 0.02}}}
"""
_FORKED = ("each[1].work", "polish[1].draw", "helper", "helper.1", "inner")
_CANCELLED, _KILLED, _TWICE, _DEADLINE, _CONTINUED = 0.1, 0.06, 0.1, 0.1, 0.2  # of the workflows
_PATIENCE_S = 3600.0


@dataclass(slots=True, kw_only=True)
class Users:
    """They go on and on, through the client that SwarmX comes with, at any gateway for anything."""

    urls: Sequence[str]
    token: str
    notes: Notes
    rng: np.random.Generator
    leaps: int = 0  # how often the clock of the gateway went so far ahead that it forgot keys, and what it waited for
    stopping: bool = False
    doing: dict[int, str] = field(default_factory=dict)
    _clients: list[AsyncClient] = field(default_factory=list, init=False)

    async def run(self, count: int) -> None:
        """Until `stopping` is set, and what they have begun has ended."""
        async with AsyncExitStack() as stack:
            clients = (AsyncClient(url, self.token, patience_s=_PATIENCE_S) for url in self.urls)
            self._clients = [await stack.enter_async_context(client) for client in clients]
            await asyncio.gather(*(self._user(number) for number in range(count)))
            await self._end_forgotten()

    def _any(self) -> AsyncClient:
        """The client of some gateway."""
        return self._clients[int(self.rng.integers(len(self._clients)))]

    async def _user(self, number: int) -> None:
        turn = 0
        while not self.stopping:
            turn += 1
            key = f"{number}-{turn}"
            self.doing[number] = key
            try:
                await self._turn(key)
            except SwarmXError as error:
                self.notes.note("wrong", key, f"{error!r}")
            del self.doing[number]

    async def _turn(self, key: str) -> None:
        leaps = self.leaps
        workflow_id = await self._submitted(key)
        await asyncio.gather(self._meddle(workflow_id), self._signal(workflow_id, leaps))
        workflow = await self._ended(workflow_id)
        if self.rng.random() >= _CONTINUED:
            return
        if workflow.state == "finished":
            node = str(self.rng.choice(_FORKED))
            again = self._accepted(f"{key}-fork", lambda name: self._any().fork(workflow_id, node, key=name))
        elif workflow.error_node is not None:
            again = self._accepted(f"{key}-retry", lambda name: self._any().retry(workflow_id, key=name))
        else:
            return
        await self._let_end(await again)  # it may share the signal with the first one

    async def _end_forgotten(self) -> None:
        """Signal what still runs: a key that was forgotten and sent again brought two, and the first has no user."""
        for summary in [summary async for summary in self._any().list(state="running")]:
            await self._let_end(summary.workflow_id)

    async def _let_end(self, workflow_id: str) -> None:
        """Signal a workflow, which may have its signal or have ended by now, and wait for its end."""
        with suppress(Conflict, Unprocessable):
            await self._any().signal(workflow_id, "go", {"by": "a user"})
        await self._ended(workflow_id)

    async def _submitted(self, key: str) -> str:
        spec = f"{SPEC}deadline_s: 7200\n" if self.rng.random() < _DEADLINE else SPEC
        return await self._accepted(key, lambda name: self._any().submit(spec, key=name))

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

    async def _meddle(self, workflow_id: str) -> None:
        chance = self.rng.random()
        await asyncio.sleep(float(self.rng.uniform(0.0, 0.05)))
        if chance < _CANCELLED + _KILLED:
            clients = [self._any() for _ in range(self._times())]
            verbs = (client.cancel if chance < _CANCELLED else client.kill for client in clients)
            await asyncio.gather(*(verb(workflow_id) for verb in verbs))

    async def _signal(self, workflow_id: str, leaps: int) -> None:
        await asyncio.sleep(float(self.rng.uniform(0.0, 0.05)))
        try:
            clients = [self._any() for _ in range(self._times())]
            await asyncio.gather(*(c.signal(workflow_id, "go", {"by": "a user"}, key=workflow_id) for c in clients))
        except (Conflict, Unprocessable):
            if self.leaps == leaps and not (await self._any().get(workflow_id)).ended:
                raise

    async def _ended(self, workflow_id: str) -> Workflow:
        """The workflow once it has ended; half of them are followed, event by event."""
        if self.rng.random() < 0.5:
            numbers = [event.seq async for event in self._any().events(workflow_id)]
            if numbers != list(range(1, len(numbers) + 1)):
                self.notes.note("wrong", workflow_id, f"was followed with gaps or repeats: {numbers}")
            self.notes.note("followed", workflow_id, str(len(numbers)))
        workflow = await self._any().wait(workflow_id)
        self.notes.note("ended", workflow_id, workflow.state)
        return workflow

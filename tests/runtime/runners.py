"""Workflows to run, a model that echoes, and what the store has of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from swarmx.core.failures import Failure
from swarmx.core.records import ModelRequest, ModelResult
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.events import Cancelled, Failed, Finished, NodeFinished, decode_event

Start = Callable[..., WorkflowRunner]
"""Makes a runner over the store of the test, which is closed after it."""

CHAIN = """
name: chain
kind: test
inputs: {topic: null}
nodes:
  plan: {kind: llm, model: m, prompt: "plan {{ inputs.topic }}"}
  lines: {kind: tool, function: split_lines, args: {text: "{{ plan.text }}"}}
  each:
    kind: map
    over: lines
    do: {work: {kind: llm, model: m, role: worker, prompt: "work on {{ item }}"}}
    result: "{{ work.text }}"
  sum_up: {kind: llm, model: m, prompt: "{{ each | join(', ') }}"}
outputs: {answer: "{{ sum_up.text }}"}
"""
ONE = "{name: one, nodes: {only: {kind: llm, model: m, prompt: hello}}}"
TWO = "{name: two, nodes: {a: {kind: llm, model: m, prompt: aa}, b: {kind: llm, model: m, prompt: bb}}}"


def chat(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}


@dataclass(kw_only=True)
class EchoModel:
    """Stands in for a model: echoes the prompt, or does what `answers` says for the node; `hung` calls never answer."""

    answers: dict[str, Callable[[ModelRequest], ModelResult | Awaitable[ModelResult]]] = field(default_factory=dict)
    hung: frozenset[str] = frozenset()
    asked: list[ModelRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    hanging: asyncio.Event = field(default_factory=asyncio.Event)

    async def complete(self, request: ModelRequest) -> ModelResult:
        self.asked.append(request)
        if request.node in self.hung:
            self.hanging.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.append(request.node)
                raise
        await asyncio.sleep(0)
        if request.node in self.answers:
            answer = self.answers[request.node](request)
            return answer if isinstance(answer, ModelResult) else await answer
        if request.node == "plan":
            return self.result(request, "one\ntwo\nthree")
        return self.result(request, request.body["messages"][-1]["content"].upper())

    def result(self, request: ModelRequest, text: str) -> ModelResult:
        return ModelResult(call_id=f"call-{request.node}", replica_id="r", attempts=1, answer=chat(text))


def refusal(reason: str) -> Callable[[ModelRequest], ModelResult]:
    failure = Failure(cause="refused", error=reason)
    return lambda request: ModelResult(call_id="refused", replica_id=None, attempts=3, failure=failure)


@dataclass
class FixedClock:
    time_s: float = 1000.0

    def now_s(self) -> float:
        return self.time_s


async def terminal_events(store: SqliteStore, workflow_id: str) -> list[str]:
    events = [decode_event(event.body) for event in await store.events(workflow_id)]
    return [type(event).__name__ for event in events if isinstance(event, Finished | Failed | Cancelled)]


async def nodes_finished(store: SqliteStore, workflow_id: str) -> set[str]:
    events = [decode_event(event.body) for event in await store.events(workflow_id)]
    return {event.path for event in events if isinstance(event, NodeFinished)}


async def kinds_of(store: SqliteStore, workflow_id: str) -> list[type]:
    """The events of a workflow, by type."""
    return [type(decode_event(event.body)) for event in await store.events(workflow_id)]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Let others run until it holds."""
    while not await condition():
        await asyncio.sleep(0)

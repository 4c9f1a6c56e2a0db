"""Agents for tests: a catalogue, the answers of models, and runs of one agent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from swarmx.core.toolbox import ToolSpec
from swarmx.workflows.answers import Usable
from swarmx.workflows.events import Event, NodeFinished, Spent
from swarmx.workflows.plan import advance, read_answer
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from swarmx.workflows.work import Start, StartToolCall

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
VERDICT = {"type": "object", "properties": {"verdict": {"type": "string"}}, "required": ["verdict"]}


def spec_of(name: str, *, parameters: dict[str, Any] = CITY, idempotent: bool = True) -> ToolSpec:
    return ToolSpec(
        name=name,
        description=f"What {name} is for.",
        parameters=parameters,
        pool="tools",
        timeout_s=30.0,
        idempotent=idempotent,
    )


CATALOGUE = {name: spec_of(name) for name in ("weather", "maps.find")} | {"pay": spec_of("pay", idempotent=False)}


def called(*uses: tuple[str, Any], text: str | None = None, **usage: int) -> dict[str, Any]:
    """A model's answer that asks for tools, each a name and arguments (JSON text as it is)."""
    calls = [
        {
            "id": f"id-{number}",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
        }
        for number, (name, given) in enumerate(uses, 1)
    ]
    message = {"role": "assistant", "content": text, "tool_calls": calls}
    return {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage}


def said(text: str | None, *, reason: str = "stop", **usage: int) -> dict[str, Any]:
    """A model's answer in words."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}


class Agent:
    """A run of one agent `a`, with all its events and the calls that are out."""

    def __init__(
        self,
        *,
        catalogue: Mapping[str, ToolSpec] = CATALOGUE,
        whole: dict[str, Any] | None = None,
        nodes: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        node = {"kind": "agent", "model": "m", "prompt": "Go.", "tools": ["weather", "maps.find", "pay"], **fields}
        spec = parse_workflow({"name": "x", "nodes": {"a": node, **(nodes or {})}, **(whole or {})})
        self.catalogue = dict(catalogue)
        self.run, submitted = Run.start(spec, {})
        self.events: list[Event] = [submitted]
        self.out: dict[str, Start] = {}
        self.take()

    def take(self, *events: Event, now_s: float = 0.0) -> list[Start]:
        """Have these happen; returns the calls that follow."""
        recorded, calls = advance(self.run, events, now_s=now_s, tools=self.catalogue)
        self.events += recorded
        self.out |= {call.path: call for call in calls}
        for path in self.out.keys() - self.run.in_flight.keys():
            del self.out[path]
        return calls

    def model(self, path: str, answer: Any, *, spent: Spent | None = None) -> list[Start]:
        """The model of a step answers; the answer has to be usable."""
        read = read_answer(self.run, path, answer)
        assert isinstance(read, Usable), read
        return self.take(NodeFinished(path=path, output=read.output, spent=spent))

    def tool(self, path: str, output: Any) -> list[Start]:
        """A tool answers."""
        assert isinstance(self.out[path], StartToolCall)
        return self.take(NodeFinished(path=path, output=output))

    def messages(self, path: str) -> list[dict[str, Any]]:
        """The conversation that the model of a step is asked with."""
        call: Any = self.out[path]
        found: list[dict[str, Any]] = call.body["messages"]
        return found

    def body(self, path: str) -> dict[str, Any]:
        """The request of a step's model call."""
        call: Any = self.out[path]
        found: dict[str, Any] = call.body
        return found

    @property
    def error(self) -> str:
        """Why the run failed."""
        return str(getattr(self.run.end, "error", ""))

    @property
    def left(self) -> Any:
        """What the agent left."""
        return getattr(self.run.end, "outputs", {}).get("a")

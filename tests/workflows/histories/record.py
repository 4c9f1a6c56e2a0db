"""Records histories of this version: `python -m tests.workflows.histories.record`. What was recorded once stays.

A history is what a released program left in somebody's database. Later programs must read it and come to the same
state, so a folder is written by the code of its time and never again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from swarmx.core.failures import Failure
from swarmx.core.toolbox import ToolSpec
from swarmx.workflows.events import (
    EVENTS_VERSION,
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    NodeFailed,
    NodeFinished,
    SignalReceived,
    Spent,
    encode_event,
)
from swarmx.workflows.forks import fork
from swarmx.workflows.plan import advance, calls_in_flight
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.spending import Price
from swarmx.workflows.state import Run
from swarmx.workflows.work import StartModelCall

FOLDER = Path(__file__).parent
KNOWN = {
    name: ToolSpec(
        name=name,
        description=f"What {name} is for.",
        parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        pool="tools",
        timeout_s=30.0,
        idempotent=name != "pay",
    )
    for name in ("weather", "pay")
}
PRICES = {"m": Price(input_per_million=1000.0, output_per_million=2000.0)}

CHAIN = """
name: chain
kind: test
deadline_s: 600
priority: 2
inputs: {topic: bees, tone: sober}
nodes:
  plan:
    kind: llm
    model: big
    role: planner
    system: You plan in a {{ inputs.tone }} tone.
    prompt: "plan {{ inputs.topic }}"
    max_tokens: 280
    temperature: 0.6
    schema: {type: object, properties: {parts: {type: array, items: {type: string}}}, required: [parts]}
  each:
    kind: map
    over: plan.json.parts
    as: part
    max_items: 8
    do:
      draft: {kind: llm, model: small, role: worker, prompt: "write {{ part }}"}
      check: {kind: llm, model: small, prompt: "check {{ draft.text }}"}
    result: "{{ check.text }}"
  sum_up: {kind: llm, model: big, prompt: "{{ each | join(', ') }}"}
outputs: {answer: "{{ sum_up.text }}", parts: "{{ plan.json.parts }}"}
"""
LOOP = """
name: refine
nodes:
  poem:
    kind: loop
    max_iterations: 3
    until: review.json.verdict == "approve"
    do:
      draft: {kind: llm, model: m, prompt: "{{ iteration }}: {{ previous | default('') }}"}
      review:
        kind: llm
        model: m
        prompt: "{{ draft.text }}"
        schema: {type: object, properties: {verdict: {type: string}}, required: [verdict]}
    result: "{{ draft.text }}"
"""
TOOLS = """
name: tools and joins
inputs: {notes: "first\\nsecond\\nfirst"}
nodes:
  lines: {kind: tool, function: split_lines, args: {text: "{{ inputs.notes }}"}}
  distinct: {kind: tool, function: unique, args: {items: "{{ lines }}"}}
  both: {kind: join, of: [lines, distinct]}
outputs: {all: "{{ both }}", said: "{{ distinct | join('+') }}!"}
"""
PICTURE = """
name: picture
inputs: {side: 256}
nodes:
  draw: {kind: image, model: sdxl, prompt: a bee, steps: 12, width: "{{ inputs.side * 2 }}", height: 512, n: 2}
"""
NESTED = """
name: nested
nodes:
  outer:
    kind: map
    over: "[2, 1]"
    as: count
    do:
      inner:
        kind: loop
        max_iterations: 2
        until: iteration >= count
        do:
          say: {kind: llm, model: m, prompt: "{{ count }}.{{ iteration }}"}
  empty: {kind: map, over: "[]", do: {never: {kind: llm, model: m, prompt: p}}, needs: [outer]}
"""
TWO = "{name: two, nodes: {a: {kind: llm, model: m, prompt: aa}, b: {kind: llm, model: m, prompt: bb}}}"
PATIENT = """
name: patient
limits: {retries: 3, fan_out: 2}
inputs: {score: 5}
nodes:
  ask: {kind: llm, model: m, prompt: hello, timeout_s: 30, retry: {attempts: 3, backoff_s: 10, on: [timeout, replica]}}
  route:
    kind: branch
    cases:
      - {when: inputs.score > 8, do: {high: {kind: llm, model: m, prompt: "high {{ ask.text }}"}}}
      - when: inputs.score > 4
        do: {mid: {kind: llm, model: m, prompt: "mid {{ ask.text }}"}}
        result: "{{ mid.text }}"
    else: {do: {low: {kind: tool, function: upper, args: {text: low}}}}
"""
GATE = """
name: gate
signals:
  approve: {timeout_s: 60, default: {ok: true}, schema: {type: object, properties: {ok: {type: boolean}}}}
  note: {}
workflows:
  page:
    inputs: {topic: null, tone: sober}
    nodes:
      draft: {kind: llm, model: m, prompt: "{{ inputs.topic }}, {{ inputs.tone }}"}
      check: {kind: llm, model: m, prompt: "{{ draft.text }} {{ signals.note }}"}
    outputs: {text: "{{ check.text }}"}
nodes:
  each:
    kind: map
    over: "['bees', 'wasps']"
    do: {one: {kind: workflow, use: page, inputs: {topic: "{{ item }}"}}}
    result: "{{ one.text }}"
  send: {kind: llm, model: m, prompt: "{{ each | join(' ') }} {{ signals.approve.ok }}"}
outputs: {sent: "{{ send.text }}", approved: "{{ signals.approve.ok }}"}
"""
THRIFTY = """
name: thrifty
budget: {steps: 3, money: 5.0}
nodes:
  think:
    kind: loop
    max_iterations: 4
    budget: {tokens: 2000, replica_s: 60}
    do: {step: {kind: llm, model: m, prompt: "{{ iteration }}", retry: {attempts: 2, backoff_s: 0}, timeout_s: 30}}
"""
AGENT = """
name: agent
nodes:
  help:
    kind: agent
    model: m
    system: You help.
    prompt: How is the weather?
    tools: [weather]
    functions: [upper]
    max_steps: 3
  pay: {kind: tool, tool: pay, args: {city: "{{ help.text }}"}}
"""
LARGE = """
name: large
inputs: {n: null}
nodes:
  many: {kind: map, over: inputs.n, max_items: 300, do: {one: {kind: llm, model: m, prompt: "do {{ item }}"}}}
  count: {kind: tool, function: length, args: {value: "{{ many }}"}}
"""


def text(value: str, json: Any = None) -> dict[str, Any]:
    """What an llm node leaves."""
    return {"text": value, "json": json, "usage": {"prompt_tokens": 3, "completion_tokens": 5}}


def answer(path: str) -> Any:
    """What the model of these histories answers to the node."""
    before, _, name = path.rpartition(".")
    if name.isdigit() and not before.rpartition(".")[2].isdigit():  # a step of an agent
        uses = [("weather", '{"city":"Bonn"}'), ("upper", '{"text":"x"}')] if name == "1" else []
        asked = [{"id": f"use-{number}", "name": use[0], "arguments": use[1]} for number, use in enumerate(uses)]
        return {"text": "" if uses else f"{path} said", "uses": asked, "usage": {"completion_tokens": 5}}
    if name == "plan":
        return text("", {"parts": ["one", "two"]})
    if name == "review":
        return text("", {"verdict": "approve" if "[2]" in path else "revise"})
    if name == "draw":
        return {"images": [{"sha256": "0" * 64, "media_type": "image/png", "bytes": 8}]}
    return text(f"{path} said")


class Recording:
    """A run whose events are kept."""

    def __init__(self, source: str, **inputs: Any) -> None:
        self.run, submitted = Run.start(parse_workflow(source), inputs)
        self.events: list[Event] = [submitted]
        self.take()

    def take(self, *events: Event, now_s: float = 0.0) -> Recording:
        self.events += advance(self.run, events, now_s=now_s, tools=KNOWN, prices=PRICES)[0]
        return self

    def fail(self, path: str) -> Recording:
        return self.take(after_failure(self.run, path, Failure(cause="replica", error="it broke"), 0.0))

    def fork(self, path: str) -> Recording:
        self.events = fork(self.events, path, forked_from="wf-old", deadline_at_s=500.0)
        self.run = Run.rebuild(self.events)
        return self.take()

    def signal(self, name: str, value: Any) -> Recording:
        return self.take(SignalReceived(name=name, value=value, signal_id=f"id of {name}"))

    def spend(self, path: str) -> Recording:
        spent = Spent(steps=1, prompt_tokens=3, output_tokens=5, money=0.5, replica_s=1.5)
        return self.take(NodeFinished(path=path, output=answer(path), call_id=f"call_{path}", spent=spent))

    def answer(self, *paths: str) -> Recording:
        for path in paths:
            self.take(NodeFinished(path=path, output=answer(path), call_id=f"call_{path}"))
        return self

    def finish(self) -> Recording:
        while self.run.in_flight:
            self.answer(next(iter(self.run.in_flight)))
        return self


SCENARIOS: dict[str, Callable[[], Recording]] = {
    "chain_finished": lambda: Recording(CHAIN).finish(),
    "chain_in_flight": lambda: Recording(CHAIN, topic="wasps").answer("plan", "each[1].draft", "each[1].check"),
    "chain_failed": lambda: (
        Recording(CHAIN).answer("plan").take(NodeFailed(path="each[0].draft", error="no_replica", call_id="call_x"))
    ),
    "chain_failed_by_its_template": lambda: Recording(TOOLS.replace("{{ both }}", "{{ both.nope }}")),
    "chain_cancelled": lambda: Recording(CHAIN).answer("plan").take(CancelRequested()),
    "deadline": lambda: Recording(CHAIN).answer("plan").take(Failed(error="deadline")),
    "loop_in_its_second_iteration": lambda: Recording(LOOP).answer("poem[1].draft", "poem[1].review"),
    "loop_finished": lambda: Recording(LOOP).finish(),
    "tools_and_joins": lambda: Recording(TOOLS),
    "picture_in_flight": lambda: Recording(PICTURE),
    "picture_finished": lambda: Recording(PICTURE).finish(),
    "nested_in_flight": lambda: Recording(NESTED).answer("outer[0].inner[1].say"),
    "nested_finished": lambda: Recording(NESTED).finish(),
    "two_just_begun": lambda: Recording(TWO),
    "two_cancelling": lambda: _cancelling(Recording(TWO).answer("b")),
    "resting": lambda: Recording(PATIENT).fail("ask"),
    "second_attempt_in_flight": lambda: Recording(PATIENT).fail("ask").take(now_s=10.0),
    "timed_out_until_it_failed": lambda: Recording(PATIENT).take(now_s=30.0).take(now_s=70.0).take(now_s=120.0),
    "branch_in_flight": lambda: Recording(PATIENT).answer("ask"),
    "branch_with_its_else": lambda: Recording(PATIENT, score=1).finish(),
    "killed": lambda: Recording(PATIENT).answer("ask").take(Cancelled(killed=True)),
    "forked": lambda: Recording(PATIENT).finish().fork("route"),
    "waiting_for_signals": lambda: Recording(GATE).answer("each[0].one.draft", "each[1].one.draft"),
    "signal_received": lambda: Recording(GATE).signal("note", "short").answer("each[0].one.draft"),
    "signal_by_default": lambda: Recording(GATE).signal("note", "short").finish().take(now_s=60.0),
    "sub_workflows_finished": lambda: Recording(GATE).signal("note", None).signal("approve", {"ok": False}).finish(),
    "sub_workflow_forked": lambda: (
        Recording(GATE).signal("note", 1).signal("approve", {"ok": True}).finish().fork("each[0].one.check")
    ),
    "budget_reserved": lambda: Recording(THRIFTY).spend("think[1].step"),
    "budget_charged_for_what_was_late": lambda: Recording(THRIFTY).take(now_s=30.0),
    "budget_used_up": lambda: Recording(THRIFTY).spend("think[1].step").spend("think[2].step").spend("think[3].step"),
    "agent_asks": lambda: Recording(AGENT),
    "agent_uses_tools": lambda: Recording(AGENT).answer("help.1"),
    "agent_goes_on": lambda: Recording(AGENT).answer("help.1", "help.1.1"),
    "tool_in_flight": lambda: Recording(AGENT).answer("help.1", "help.1.1", "help.2"),
    "large_map_in_flight": lambda: Recording(LARGE, n=list(range(300))).answer(*(f"many[{i}].one" for i in range(150))),
}


def _cancelling(recording: Recording) -> Recording:
    """The request is stored, and the process dies before the end is."""
    event = CancelRequested()
    recording.run.apply(event)
    recording.events.append(event)
    return recording


def state_of(run: Run) -> dict[str, Any]:
    """All that a history has to come to again: how far each node is, what was left, which calls are made again."""
    calls = [
        {"path": call.path, "kind": call.kind, "role": call.role, "model": call.model, "body": call.body}
        if isinstance(call, StartModelCall)
        else {"path": call.path, "tool": call.tool, "arguments": call.arguments, "idempotent": call.idempotent}
        for call in calls_in_flight(run, KNOWN)
    ]
    state: dict[str, Any] = msgspec.to_builtins(
        {
            "end": run.end,
            "cancelling": run.cancelling,
            "signals": run.signals,
            "awaited": run.awaited,
            "spent": run.ledger.spent,
            "reserved": run.ledger.reserved,
            "resting": run.resting,
            "timeouts": run.timeouts,
            "attempts": {path: node.attempt for path, node in run.nodes.items() if node.attempt > 1},
            "failed": None if run.failure is None else run.failure.path,
            "nodes": {path: node.state for path, node in run.nodes.items()},
            "due": list(run.due),
            "outputs": run.root.outputs,
            "calls": [] if run.ended else calls,
        }
    )
    return state


def write(folder: Path, scenarios: Sequence[str]) -> None:
    """One file a history: its events, a line each; the last line is the state. None is written twice."""
    folder.mkdir(exist_ok=True)
    for name in scenarios:
        if (folder / f"{name}.jsonl").exists():
            continue
        recording = SCENARIOS[name]()
        lines = [*map(encode_event, recording.events), msgspec.json.encode({"state": state_of(recording.run)})]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")


if __name__ == "__main__":
    write(FOLDER / f"v{EVENTS_VERSION}", list(SCENARIOS))

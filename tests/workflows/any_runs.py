"""Random definitions with every kind of node, and what their models, tools, senders and clocks do."""

from __future__ import annotations

from random import Random  # noqa: TID251  # the type of what hypothesis hands in
from typing import Any

from swarmx.core.failures import PASSING, Failure
from swarmx.workflows.events import CancelRequested, Event, NodeFinished, SignalReceived, Spent
from swarmx.workflows.nodes import TurnNode
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spending import Price
from swarmx.workflows.state import Run

PRICES = {"m": Price(input_per_million=1.0, output_per_million=3.0, per_image=0.001)}
SIGNALS = ("first", "second")
_BODIES = ("map", "loop", "branch")
_CALLS = ("llm", "image", "agent", "remote")


def definition(rng: Random, *, bounded: bool = True) -> dict[str, Any]:
    """A workflow that can run: whatever it reads is there, whatever it calls is in the catalogue of `agents`.

    One that is not `bounded` has no budgets and no limits of its own.
    """
    budgets = 0.15 if bounded else 0.0
    workflows: dict[str, Any] = {}
    for name in ("leaf", "upper")[: rng.randint(0, 2)]:
        nodes = _nodes(rng, f"{name}_", 1, list(workflows), ["inputs.given"], budgets)
        workflows[name] = {"inputs": {"given": None}, "nodes": nodes}
    found = {
        "name": "any",
        "inputs": {"given": "something"},
        "workflows": workflows,
        "signals": {"first": {"timeout_s": 50, "default": "nobody"}, "second": {"timeout_s": 80}},
        "limits": {"nodes": rng.choice([12, 60, 2000]), "retries": rng.randint(0, 4)} if bounded else {},
        "nodes": _nodes(rng, "", 0, list(workflows), ["inputs.given"], budgets),
    }
    if rng.random() < 2 * budgets:
        found["budget"] = _budget(rng)
    if rng.random() < 0.2:
        found["outputs"] = {"all": "{{ signals.first }}"}
    return found


def _nodes(
    rng: Random, prefix: str, depth: int, workflows: list[str], around: list[str], budgets: float
) -> dict[str, Any]:
    nodes: dict[str, Any] = {}
    for number in range(rng.randint(1, 4 if depth == 0 else 2)):
        id = f"{prefix}n{number}"
        known = [*around, *nodes]
        kinds = [*_CALLS, "function"] + ["join"] * bool(nodes) + ["workflow"] * bool(workflows)
        kind = rng.choice(kinds + list(_BODIES) * (depth < 2))
        node = _node(rng, kind, id, depth, workflows, known, list(nodes), budgets)
        node["needs"] = rng.sample(list(nodes), rng.randint(0, min(2, len(nodes))))
        if kind in _CALLS and rng.random() < 0.4:
            node["retry"] = {"attempts": rng.randint(1, 3), "backoff_s": rng.choice([0, 5])}
            node["timeout_s"] = rng.choice([3, 1000])
        if kind != "join" and rng.random() < budgets:
            node["budget"] = _budget(rng)
        nodes[id] = node
    return nodes


def _node(
    rng: Random,
    kind: str,
    id: str,
    depth: int,
    workflows: list[str],
    known: list[str],
    siblings: list[str],
    budgets: float,
) -> dict[str, Any]:
    read = f"{{{{ {rng.choice(known)} }}}}"
    if rng.random() < 0.15:
        read += f" {{{{ signals.{rng.choice(SIGNALS)} }}}}"

    def inside(suffix: str = "") -> dict[str, Any]:
        return _nodes(rng, f"{id}{suffix}_", depth + 1, workflows, known, budgets)

    match kind:
        case "llm" | "image":
            return {"kind": kind, "model": "m", "prompt": f"do {read}"}
        case "agent":
            tools = {"tools": ["weather"], "workflows": workflows[: rng.randint(0, 2)]}
            return {"kind": kind, "model": "m", "prompt": read, "max_steps": rng.randint(1, 3), **tools}
        case "remote":
            return {"kind": "tool", "tool": rng.choice(["weather", "pay"]), "args": {"city": f"at {read}"}}
        case "function":
            return {"kind": "tool", "function": "json_dump", "args": {"value": [read, 1]}}
        case "join":
            return {"kind": kind, "of": rng.sample(siblings, rng.randint(1, min(2, len(siblings))))}
        case "workflow":
            return {"kind": kind, "use": rng.choice(workflows), "inputs": {"given": f"for {read}"}}
        case "map":
            return {"kind": kind, "over": str(list(range(rng.randint(0, 3)))), "do": inside()}
        case "branch":
            node = {"kind": kind, "cases": [{"when": rng.choice(["true", "false"]), "do": inside("a")}]}
            return node | ({"else": {"do": inside("b")}} if rng.random() < 0.5 else {})
        case _:
            until = rng.choice(["iteration >= 2", "false", "signals.second"])
            return {"kind": "loop", "until": until, "max_iterations": rng.randint(1, 3), "do": inside()}


def _budget(rng: Random) -> dict[str, Any]:
    limits = {"tokens": rng.choice([400, 2000, 10**6]), "steps": rng.randint(1, 12), "money": rng.choice([0.002, 1.0])}
    return {name: limits[name] for name in rng.sample(list(limits), rng.randint(1, 3))}


def answer(run: Run, path: str) -> Any:
    """What the call of the node is answered with: the same for the same path."""
    node = run.nodes[path].step.node
    if isinstance(node, TurnNode):
        asks = not node.last and path.endswith(".1")
        uses = [{"id": "u", "name": "weather", "arguments": '{"city": "here"}'}]
        uses += [{"id": name, "name": name, "arguments": '{"given": "this"}'} for name in node.agent.workflows]
        return {"text": "" if asks else f"{path} says", "uses": uses if asks else [], "usage": {}}
    return {"text": f"{path} said", "json": None, "usage": {}}


def spent(rng: Random, run: Run, path: str) -> Spent | None:
    """What an attempt used: no more than was reserved for it; sometimes nobody knows."""
    if rng.random() < 0.1:
        return None
    most = run.ledger.out(path)
    if most is None:
        return Spent(steps=1, output_tokens=rng.randint(0, 100))
    share = rng.random()
    return Spent(
        steps=1,
        prompt_tokens=int(most.prompt_tokens * share),
        output_tokens=int(most.output_tokens * share),
        money=most.money * share,
    )


def happening(rng: Random, run: Run, now_s: float, *, trouble: bool) -> Event | None:
    """Something that comes from outside; None: nothing but time passes."""
    unsent = [name for name in SIGNALS if name not in run.signals]
    if unsent and rng.random() < 0.1:
        return signal(rng.choice(unsent))
    if trouble and rng.random() < 0.02:
        return CancelRequested()
    if not run.in_flight or rng.random() < 0.05:
        return None
    path = rng.choice(list(run.in_flight))
    if trouble and rng.random() < 0.2:
        failure = Failure(cause=rng.choice([*PASSING, "rejected"]), error="broke", begun=rng.random() < 0.5)
        return after_failure(run, path, failure, now_s, spent=spent(rng, run, path))
    return NodeFinished(path=path, output=answer(run, path), spent=spent(rng, run, path))


def signal(name: str) -> SignalReceived:
    return SignalReceived(name=name, value=f"{name} came", signal_id=f"id of {name}")

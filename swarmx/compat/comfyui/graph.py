"""What a ComfyUI graph in API format says of itself: links, ancestors, the models and files that it names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import msgspec

Graph = dict[str, dict[str, Any]]
PREFIX = "swarmx-"
"""How copies of uploads are called at servers."""
"""`{id: {"class_type": str, "inputs": {name: value, or [id, output]}}}`."""

_WEIGHTS = re.compile(r"\.(safetensors|ckpt|sft|gguf|pth|pt|bin)$", re.IGNORECASE)
_ANNOTATED = re.compile(r"^(.+?)(?: \[(input|output|temp)\])?$", re.DOTALL)


def link_of(value: object) -> tuple[str, int] | None:
    """The node and the number of its output that an input is linked to; None for a plain value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        return value[0], value[1]
    return None


def names_file(value: object) -> bool:
    """Whether it is a file as outputs name theirs: an object with `filename` and `type`."""
    return isinstance(value, dict) and isinstance(value.get("filename"), str) and "type" in value


def values_in(value: object) -> Iterator[object]:
    """A value and all that is in it."""
    rest = [value]
    while rest:
        one = rest.pop()
        yield one
        if isinstance(one, dict | list):
            rest += one.values() if isinstance(one, dict) else one


def links(graph: Graph, node_id: str) -> Iterator[tuple[str, int]]:
    """The outputs of nodes that feed a node, as often as they do."""
    for value in graph[node_id]["inputs"].values():
        link = link_of(value)
        if link is not None and link[0] in graph:
            yield link


def sources(graph: Graph, node_id: str) -> Iterator[str]:
    """The nodes that feed a node, as often as they do."""
    return (source for source, _ in links(graph, node_id))


def upstream_first(graph: Graph, targets: Iterable[str]) -> list[str]:
    """The targets and all that they need, sources before what they feed; of a cycle, in some order. No recursion: a
    chain may be as long as a request."""
    order: list[str] = []
    done: set[str] = set()
    for target in targets:
        stack = [(target, iter(list(sources(graph, target))))] if target not in done else []
        done.add(target)
        while stack:
            node_id, rest = stack[-1]
            for source in rest:
                if source not in done:
                    done.add(source)
                    stack.append((source, iter(list(sources(graph, source)))))
                    break
            else:
                order.append(node_id)
                stack.pop()
    return order


def above(graph: Graph, targets: Iterable[str]) -> Graph:
    """The targets and all that they need, in the order that the graph has them."""
    needed = set(upstream_first(graph, targets))
    return {node_id: node for node_id, node in graph.items() if node_id in needed}


def cycle_in(graph: Graph, targets: Iterable[str]) -> list[str]:
    """Nodes on one cycle above the targets, in the order of their links; empty when there is none."""
    state: dict[str, int] = {}  # 1: on the way down, 2: done
    for target in targets:
        if state.get(target):
            continue
        state[target] = 1
        stack = [(target, iter(list(sources(graph, target))))]
        while stack:
            node_id, rest = stack[-1]
            source = next(rest, None)
            if source is None:
                state[node_id] = 2
                stack.pop()
            elif state.get(source) == 1:
                path = [n for n, _ in stack]
                return path[path.index(source) :]
            elif source not in state:
                state[source] = 1
                stack.append((source, iter(list(sources(graph, source)))))
    return []


def models_in(graph: Graph) -> frozenset[str]:
    """The weights that the graph names: what a server has to load before it can run it."""
    return frozenset(
        value
        for node in graph.values()
        for value in node["inputs"].values()
        if isinstance(value, str) and _WEIGHTS.search(value[-16:])
    )


def signatures(graph: Graph, targets: Iterable[str]) -> dict[str, str]:
    """A name for what each node above the targets computes, by node: the same where class, values and all that feeds
    it are the same. A server that holds the result of one computes it no second time."""
    names: dict[str, str] = {}
    for node_id in upstream_first(graph, targets):
        node = graph[node_id]
        inputs = {}
        for name, value in sorted(node["inputs"].items()):
            link = link_of(value)
            inputs[name] = value if link is None else ["\0", names.get(link[0], ""), link[1]]
        key = msgspec.json.encode([node["class_type"], inputs], order="deterministic")
        names[node_id] = blake2b(key, digest_size=12).hexdigest()
    return names


def file_name(value: str) -> tuple[str, str]:
    """The name and the folder of a file as inputs give them: `name`, or `name [output]`."""
    match = _ANNOTATED.match(value)
    return (match[1], match[2] or "input") if match else (value, "input")


def texts_in(graph: Graph) -> Iterator[tuple[str, str, str]]:
    """Every text input: node, name, value."""
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if isinstance(value, str):
                yield node_id, name, value


def with_inputs(graph: Graph, changes: Mapping[tuple[str, str], object]) -> Graph:
    """The graph with other values for some inputs, by node and name; the one that came in is left alone."""
    if not changes:
        return graph
    changed = dict(graph)
    for (node_id, name), value in changes.items():
        node = changed[node_id]
        changed[node_id] = {**node, "inputs": {**node["inputs"], name: value}}
    return changed

"""Judges a graph before it is accepted, in the shapes in which ComfyUI's servers answer.

The `type` of an error, and where it is put, are those of the protocol; what the messages say is ours. Nothing here asks
a server: what only its own code knows (a custom node that judges its values itself) is a doubt, not an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarmx.compat.comfyui.graph import (
    PREFIX,
    Graph,
    cycle_in,
    file_name,
    link_of,
    names_file,
    sources,
    upstream_first,
    values_in,
)
from swarmx.compat.comfyui.nodes import InputSpec, NodeSpec

MAX_NODES = 20_000
_LONGEST_LIST = 20  # of options that an error repeats
_LONGEST_VALUE = 500  # characters of a value in a message
_MOST_OUTPUTS = 64  # whose errors are told

Error = dict[str, Any]

_ELSEWHERE = re.compile(r"\[(output|temp)\]\Z|^[/\\]|(^|[/\\])\.\.([/\\]|$)|^" + re.escape(PREFIX))
_LONGEST_CHAIN = 500  # of links: a server goes up them by recursion, and ends where it may not go that deep


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """`outputs` are the output nodes that will run; `node_errors` tell why others will not.

    `files` are the inputs of nodes that will run, by node and name, that name an uploaded file. With `doubtful`, only a
    server can tell whether it takes the graph.
    """

    outputs: tuple[str, ...]
    node_errors: dict[str, Error] = field(default_factory=dict)
    files: frozenset[tuple[str, str]] = frozenset()
    doubtful: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The body of the answer, whose status is 400."""

    error: Error
    node_errors: dict[str, Error] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error, "node_errors": self.node_errors}


def error(kind: str, message: str, details: str = "", **extra: object) -> Error:
    """One error as clients expect it."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def validate(
    prompt: object,
    specs: Mapping[str, NodeSpec],
    *,
    targets: object = None,
    uploads: Collection[str] = (),
) -> Accepted | Rejected:
    """Whether the graph can run where `specs` are. `targets` are the output nodes that are wanted, None for all;
    `uploads` the names of files that are here. Values are converted in the graph as servers do."""
    shape = _shape(prompt, targets)
    if shape is not None:
        return Rejected(error=shape)
    graph: Graph = prompt  # type: ignore[assignment]  # its shape has just been seen
    for node_id, node in graph.items():
        if node["class_type"] not in specs:
            details = f"the node {node_id!r} is of the class {node['class_type']!r}"
            return Rejected(error=error("invalid_prompt", "no server here has a class of this name", details))
    wanted = None if targets is None else set(targets)  # type: ignore[call-overload]  # a list of texts, by now
    outputs = [
        node_id
        for node_id, node in graph.items()
        if specs[node["class_type"]].is_output and (wanted is None or node_id in wanted)
    ]
    if not outputs:
        return Rejected(error=error("prompt_no_outputs", "the graph has no output node that is wanted"))
    cycle = cycle_in(graph, outputs)
    if cycle:
        details = f"{' -> '.join(cycle[:20])} -> {cycle[0]}"
        return _failed(graph, {cycle[0]: [error("dependency_cycle", "nodes feed themselves", details)]}, outputs)
    return _judge(graph, specs, outputs, uploads)


def _judge(
    graph: Graph, specs: Mapping[str, NodeSpec], outputs: Sequence[str], uploads: Collection[str]
) -> Accepted | Rejected:
    found: dict[str, list[Error]] = {}
    files: dict[str, list[str]] = {}
    doubtful: set[str] = set()
    bad: set[str] = set()  # nodes with errors of their own or above them
    depth: dict[str, int] = {}
    order = upstream_first(graph, outputs)
    for node_id in order:
        judged = _node(graph, node_id, specs, uploads)
        feeding = list(sources(graph, node_id))
        depth[node_id] = 1 + max((depth[source] for source in feeding), default=0)
        if depth[node_id] == _LONGEST_CHAIN + 1:
            details = f"more than {_LONGEST_CHAIN} nodes, one above the other"
            judged.errors.append(error("exception_during_validation", "a chain of links is too long", details))
        if judged.errors:
            found[node_id] = judged.errors
        files[node_id] = judged.files
        if judged.doubtful:
            doubtful.add(node_id)
        if judged.errors or not bad.isdisjoint(feeding):
            bad.add(node_id)
    good = tuple(node_id for node_id in outputs if node_id not in bad)
    if not good:
        return _failed(graph, found, outputs)
    runs = upstream_first(graph, good)
    return Accepted(
        outputs=good,
        node_errors=_by_node(graph, found, [node_id for node_id in outputs if node_id in bad]),
        files=frozenset((node_id, name) for node_id in runs for name in files[node_id]),
        doubtful=not doubtful.isdisjoint(runs),
    )


@dataclass(slots=True)
class _Judged:
    errors: list[Error] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    doubtful: bool = False


def _node(graph: Graph, node_id: str, specs: Mapping[str, NodeSpec], uploads: Collection[str]) -> _Judged:
    node = graph[node_id]
    spec, inputs = specs[node["class_type"]], node["inputs"]
    judged = _Judged(doubtful=not spec.core)
    judged.errors += _astray(graph, spec, inputs)
    for name in [name for name in inputs if name not in spec.inputs and _names_files(inputs[name])]:
        del inputs[name]  # a note of a web page, of what was made before: some nodes show all that they are given
    for name, wanted in spec.inputs.items():
        if name not in inputs:
            if wanted.required:
                judged.errors.append(
                    error("required_input_missing", "a required input is missing", name, input_name=name)
                )
            continue
        value = inputs[name]
        if isinstance(value, list):
            problem, certain = _linked(graph, specs, wanted, value)
        else:
            value, problem = _converted(wanted, value)
            certain = True
            if problem is None:
                if not isinstance(value, dict | list):  # what is wrapped stays so: the server takes it out
                    inputs[name] = value
                problem = _not_a_value(wanted, value)
            if problem is None:
                if _is_file(wanted, value, uploads):
                    judged.files.append(name)
                elif _is_elsewhere(wanted, value):
                    problem = _no_such_file(wanted, value)
                else:
                    problem, certain = _in_range(wanted, value) or _in_list(wanted, value), False
        if problem is not None and (certain or spec.core):
            judged.errors.append(problem)
    return judged


def _astray(graph: Graph, spec: NodeSpec, inputs: Mapping[str, Any]) -> Iterable[Error]:
    """Links to nowhere under names that the class does not have: a server follows them, and does not check them."""
    for name, value in inputs.items():
        if name not in spec.inputs and _is_as_a_link(value):
            link = link_of(value)
            if link is None or link[0] not in graph:
                yield _to_nowhere(name, value, None)


def _to_nowhere(name: str, value: list[Any], shown: Any) -> Error:
    message, details = "a link is [id of a node of this graph, number of its output]", f"{name}: {_short(value)}"
    return error("bad_linked_input", message, details, input_name=name, input_config=shown, received_value=value)


def _is_as_a_link(value: object) -> bool:
    """What a server takes for a link, sound or not."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int | float)
    )


def _linked(
    graph: Graph, specs: Mapping[str, NodeSpec], wanted: InputSpec, value: list[Any]
) -> tuple[Error | None, bool]:
    """What is wrong with a link, and whether the node itself could see that otherwise."""
    about: dict[str, Any] = {"input_name": wanted.name, "input_config": wanted.shown}
    link = link_of(value)
    if link is None or link[0] not in graph:
        return _to_nowhere(wanted.name, value, wanted.shown), True
    outputs = specs[graph[link[0]]["class_type"]].outputs
    if not 0 <= link[1] < len(outputs):
        details = f"{wanted.name}: the node {link[0]!r} has {len(outputs)} outputs, none with the number {link[1]}"
        return error(
            "bad_linked_input", "a link to an output that there is not", details, **about, received_value=value
        ), True
    received = outputs[link[1]]
    if _fits(received, wanted.type):
        return None, False
    details = f"{wanted.name}: received_type({received}), input_type({wanted.type})"
    message = "an output is linked to an input of another type"
    return error("return_type_mismatch", message, details, **about, received_type=received, linked_node=value), False


def _fits(received: object, wanted: object) -> bool:
    """Whether the types, each one or several between commas, have one in common. A star stands for any."""
    if received == wanted or "*" in (received, wanted):
        return True
    if (isinstance(received, list) and wanted == "COMBO") or (isinstance(wanted, list) and received == "COMBO"):
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    return bool({part.strip() for part in received.split(",")} & {part.strip() for part in wanted.split(",")})


def _converted(wanted: InputSpec, value: Any) -> tuple[Any, Error | None]:
    """The value as the type that the input has."""
    if isinstance(value, dict) and "__value__" in value:  # how a list is told apart from a link
        value = value["__value__"]
    kinds: dict[str, type] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
    kind = kinds.get(wanted.type) if isinstance(wanted.type, str) else None
    if kind is None:
        return value, None
    try:
        return kind(value), None
    except (ValueError, TypeError, OverflowError) as problem:
        return value, error(
            "invalid_input_type",
            f"a value cannot be read as {wanted.type}",
            f"{wanted.name}: {_short(value)}: {problem}"[:_LONGEST_VALUE],
            input_name=wanted.name,
            input_config=wanted.shown,
            received_value=value,
            exception_message=str(problem)[:_LONGEST_VALUE],
        )


def _not_a_value(wanted: InputSpec, value: Any) -> Error | None:
    """Why a value may go to no server, whatever its node says: it would make the server run a node that was not judged,
    or a node that shows its inputs would seem to have made the file."""
    about: dict[str, Any] = {"input_name": wanted.name, "input_config": None, "received_value": value}
    details = f"{wanted.name}: {_short(value)}"
    if _is_as_a_link(value):
        message = "a list in __value__ is what a server takes for a link; link the input itself, or send another list"
        return error("bad_linked_input", message, details, **about)
    if _names_files(value):
        message = "a value names the file of an output; give an input that loads files the name alone"
        return error("invalid_input_type", message, details, **about)
    return None


def _names_files(value: object) -> bool:
    return any(map(names_file, values_in(value)))


def _in_range(wanted: InputSpec, value: Any) -> Error | None:
    if not isinstance(value, int | float):
        return None
    about: dict[str, Any] = {"input_name": wanted.name, "input_config": wanted.shown, "received_value": value}
    least, most = wanted.settings.get("min"), wanted.settings.get("max")
    if isinstance(least, int | float) and value < least:
        return error("value_smaller_than_min", f"{value} is below the minimum of {least}", wanted.name, **about)
    if isinstance(most, int | float) and value > most:
        return error("value_bigger_than_max", f"{value} is above the maximum of {most}", wanted.name, **about)
    return None


def _in_list(wanted: InputSpec, value: Any) -> Error | None:
    options = wanted.options
    if options is None or value in options:
        return None
    few = len(options) <= _LONGEST_LIST
    offered = str(list(options)) if few else f"one of {len(options)} values"
    return error(
        "value_not_in_list",
        "a value is not one of those that the servers offer",
        f"{wanted.name}: {_short(value)} not in {offered}",
        input_name=wanted.name,
        input_config=wanted.shown if few else None,
        received_value=value,
    )


def _is_file(wanted: InputSpec, value: Any, uploads: Collection[str]) -> bool:
    """Whether the value names an uploaded file: such inputs list the files of one server at one time."""
    return wanted.options is not None and isinstance(value, str) and file_name(value)[0] in uploads


def _is_elsewhere(wanted: InputSpec, value: Any) -> bool:
    """Whether the value, or one in it, leads a server to a file that it did not offer: maybe another tenant's."""
    if wanted.type == "STRING":
        return False
    texts = (one for one in values_in(value) if isinstance(one, str))
    return any(_ELSEWHERE.search(text) and text not in (wanted.options or ()) for text in texts)


def _no_such_file(wanted: InputSpec, value: Any) -> Error:
    details = f"{wanted.name}: {_short(value)}"
    about: dict[str, Any] = {"input_name": wanted.name, "input_config": None, "received_value": value}
    return error("value_not_in_list", "there is no such file of this client", details, **about)


def _failed(graph: Graph, found: Mapping[str, list[Error]], outputs: Sequence[str]) -> Rejected:
    own = [e for node_id in outputs for e in found.get(node_id, ())]
    return Rejected(
        error=error(
            "prompt_outputs_failed_validation",
            "no output of the graph can be made",
            "\n".join(f"{e['message']}: {e['details']}" for e in own),
        ),
        node_errors=_by_node(graph, found, outputs),
    )


def _by_node(graph: Graph, found: Mapping[str, list[Error]], outputs: Sequence[str]) -> dict[str, Error]:
    """The errors that are above the first of the outputs, with the outputs that they are in the way of."""
    told = outputs[:_MOST_OUTPUTS]
    order = upstream_first(graph, told) if found else []
    feeds = {output: 1 << number for number, output in enumerate(told)}  # a bit for each output that a node is above
    for node_id in reversed(order):
        for source in sources(graph, node_id):
            feeds[source] = feeds.get(source, 0) | feeds[node_id]
    return {
        node_id: {
            "errors": found[node_id],
            "dependent_outputs": [output for number, output in enumerate(told) if feeds[node_id] >> number & 1],
            "class_type": graph[node_id]["class_type"],
        }
        for node_id in order
        if node_id in found
    }


def _shape(prompt: object, targets: object) -> Error | None:
    """What is wrong with the graph before its classes are looked at."""
    if not isinstance(prompt, dict):
        return error("invalid_prompt", "a graph is an object of nodes by id", f"got {type(prompt).__name__}")
    if len(prompt) > MAX_NODES:
        return error("invalid_prompt", "the graph is too large", f"{len(prompt)} nodes, {MAX_NODES} are allowed")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        return error("invalid_prompt", "partial_execution_targets is a list of ids of nodes", _short(targets))
    for node_id, node in prompt.items():
        where = f"the node {node_id!r}"
        if not isinstance(node, dict):
            return error("invalid_prompt", "a node is an object", where)
        if not isinstance(node.get("class_type"), str):
            return error("invalid_prompt", "a node has no class_type", where)
        if not isinstance(node.get("inputs", {}), dict):
            return error("invalid_prompt", "the inputs of a node are an object", where)
        node.setdefault("inputs", {})
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."

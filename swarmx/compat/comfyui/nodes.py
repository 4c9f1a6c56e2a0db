"""What the servers can run: the union of their `/object_info`, and which of them is able to run a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from swarmx.compat.comfyui.graph import Graph

NodeInfo = dict[str, Any]
_CATEGORIES = ("required", "optional")
_WIDER: Mapping[str, Callable[[Any, Any], Any]] = {"min": min, "max": max}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input of a node class. `options` are what a combo offers, None for any other input."""

    name: str
    type: object
    settings: Mapping[str, Any]
    required: bool
    options: tuple[Any, ...] | None

    @property
    def shown(self) -> list[Any]:
        """As a server describes it."""
        return [self.type, dict(self.settings)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One node class. `core` ones come with ComfyUI: they judge their own values only where these name files."""

    name: str
    inputs: Mapping[str, InputSpec]
    outputs: tuple[object, ...]
    is_output: bool
    core: bool


def read_spec(name: str, info: NodeInfo) -> NodeSpec:
    """The spec behind one entry of `/object_info`. What is not as expected there is passed over."""
    inputs: dict[str, InputSpec] = {}
    described = info.get("input")
    for category in _CATEGORIES:
        rows = described.get(category) if isinstance(described, dict) else None
        for input_name, row in rows.items() if isinstance(rows, dict) else ():
            if isinstance(row, list) and row:
                settings = row[1] if len(row) > 1 and isinstance(row[1], dict) else {}
                options = row[0] if isinstance(row[0], list) else settings.get("options") if row[0] == "COMBO" else None
                inputs[input_name] = InputSpec(
                    name=input_name,
                    type=row[0],
                    settings=settings,
                    required=category == "required",
                    options=tuple(options) if isinstance(options, list) else None,
                )
    outputs, module = info.get("output"), str(info.get("python_module", "nodes"))
    return NodeSpec(
        name=name,
        inputs=inputs,
        outputs=tuple(outputs) if isinstance(outputs, list) else (),
        is_output=info.get("output_node") is True,
        core=module == "nodes" or module.startswith("comfy_extras."),
    )


class NodeBook:
    """Keeps the `/object_info` of every server that ever told it: a server that is away may come back.

    Only classes that match one of `allow` are there at all. Options that begin with `hidden` are left out: they are
    files that the front has put there, for one tenant.
    """

    def __init__(self, allow: Sequence[str] = ("*",), *, hidden: str = "swarmx-") -> None:
        self._allow = tuple(allow)
        self._hidden = hidden
        self._infos: dict[str, dict[str, NodeInfo]] = {}
        self._specs: dict[str, dict[str, NodeSpec]] = {}
        self.union: dict[str, NodeInfo] = {}
        self.specs: dict[str, NodeSpec] = {}
        self.generation = 0
        """Changes whenever the answer of `able` may."""

    def told(self, server: str, object_info: Mapping[str, Any]) -> None:
        """What a server says that it has."""
        infos = {
            name: _without(info, self._hidden)
            for name, info in object_info.items()
            if isinstance(info, dict) and self.allows(name)
        }
        if self._infos.get(server) == infos:
            return
        self._infos[server] = infos
        self._specs[server] = {name: read_spec(name, info) for name, info in infos.items()}
        union: dict[str, NodeInfo] = {}
        for each in self._infos.values():
            for name, info in each.items():
                union[name] = merged(union[name], info) if name in union else info
        self.union = union
        self.specs = {name: read_spec(name, info) for name, info in union.items()}
        self.generation += 1

    def allows(self, class_type: str) -> bool:
        """Whether clients may use the class here."""
        return any(fnmatchcase(class_type, pattern) for pattern in self._allow)

    def able(self, graph: Graph, nodes: Iterable[str], files: frozenset[tuple[str, str]]) -> frozenset[str]:
        """The servers that have every class, and every option that an input picks, of these nodes.

        `files` are inputs, by node and name, that name a file which is copied to the server that wants it.
        """
        wanted = [(node_id, graph[node_id]) for node_id in nodes]
        return frozenset(name for name, specs in self._specs.items() if _can(specs, wanted, files))

    def missing(self, graph: Graph, nodes: Iterable[str], files: frozenset[tuple[str, str]]) -> dict[str, list[str]]:
        """By server, what it lacks for these nodes."""
        wanted = [(node_id, graph[node_id]) for node_id in nodes]
        return {name: sorted(set(_lacks(specs, wanted, files))) for name, specs in self._specs.items()}

    @property
    def infos(self) -> dict[str, dict[str, NodeInfo]]:
        """What is known of each server."""
        return dict(self._infos)

    @property
    def servers(self) -> frozenset[str]:
        """Those that told what they have."""
        return frozenset(self._specs)


def merged(first: NodeInfo, second: NodeInfo) -> NodeInfo:
    """One description of a class for two servers: all that either offers, and the wider of two ranges.

    What both describe in another way is as the first one has it. An input is required where both require it.
    """
    one, two = first.get("input"), second.get("input")
    if one == two or not isinstance(one, dict) or not isinstance(two, dict):
        return first
    inputs: dict[str, Any] = {key: value for key, value in one.items() if key not in _CATEGORIES}
    for category in _CATEGORIES:
        rows, others = one.get(category) or {}, two.get(category) or {}
        both = {name: _merged_row(row, others[name]) for name, row in rows.items() if name in others}
        alone = {name: row for name, row in (rows | others).items() if name not in both}
        inputs.setdefault("required", {})
        inputs.setdefault("optional", {})
        inputs[category] = inputs[category] | both
        inputs["optional"] = inputs["optional"] | alone
    inputs["optional"] = {k: v for k, v in inputs["optional"].items() if k not in inputs["required"]}
    return first | {"input": {key: value for key, value in inputs.items() if value}}


def _without(info: NodeInfo, hidden: str) -> NodeInfo:
    """The description of a class without the options that begin so."""
    inputs = info.get("input")
    if not isinstance(inputs, dict):
        return info
    shown: dict[str, Any] = {}
    is_hidden = _starts(hidden)
    for category, rows in inputs.items():
        shown[category] = rows
        for name, row in rows.items() if isinstance(rows, dict) else ():
            if (kept := _row_without(row, is_hidden)) is not row:
                shown[category] = shown[category] | {name: kept}
    return info | {"input": shown}


def _row_without(row: Any, is_hidden: Callable[[object], bool]) -> Any:
    """An input without such options, of the older form or the newer: `[options, settings]`, `["COMBO", {options}]`."""
    match row:
        case [list(options), *rest] if any(map(is_hidden, options)):
            return [[option for option in options if not is_hidden(option)], *rest]
        case [kind, {"options": list(options)} as settings, *rest] if any(map(is_hidden, options)):
            return [kind, settings | {"options": [option for option in options if not is_hidden(option)]}, *rest]
        case _:
            return row


def _starts(prefix: str) -> Callable[[object], bool]:
    return lambda option: isinstance(option, str) and option.startswith(prefix)


def _merged_row(one: Any, two: Any) -> Any:
    if one == two or not (isinstance(one, list) and isinstance(two, list) and one and two):
        return one
    kind = _all_of(one[0], two[0]) if isinstance(one[0], list) and isinstance(two[0], list) else one[0]
    settings = dict(one[1]) if len(one) > 1 and isinstance(one[1], dict) else {}
    others = two[1] if len(two) > 1 and isinstance(two[1], dict) else {}
    for name, wider in _WIDER.items():
        if isinstance(settings.get(name), int | float) and isinstance(others.get(name), int | float):
            settings[name] = wider(settings[name], others[name])
        else:
            settings.pop(name, None)
    if isinstance(settings.get("options"), list) and isinstance(others.get("options"), list):
        settings["options"] = _all_of(settings["options"], others["options"])
    return [kind, settings]


def _all_of(one: list[Any], two: list[Any]) -> list[Any]:
    try:
        return list(dict.fromkeys([*one, *two]))  # there may be thousands
    except TypeError:  # options that are lists or objects
        return [*one, *(value for value in two if value not in one)]


def _can(specs: Mapping[str, NodeSpec], wanted: list[tuple[str, Any]], files: frozenset[tuple[str, str]]) -> bool:
    return next(iter(_lacks(specs, wanted, files)), None) is None


def _lacks(
    specs: Mapping[str, NodeSpec], wanted: list[tuple[str, Any]], files: frozenset[tuple[str, str]]
) -> Iterable[str]:
    for node_id, node in wanted:
        spec = specs.get(node["class_type"])
        if spec is None:
            yield f"the node class {node['class_type']}"
            continue
        if not spec.core:
            continue
        for name, value in node["inputs"].items():
            found = spec.inputs.get(name)
            if found is None or found.options is None or isinstance(value, list) or (node_id, name) in files:
                continue
            if value not in found.options:
                yield f"{value!r} for {node['class_type']}.{name}"

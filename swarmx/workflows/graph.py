"""A definition made ready to run: compiled templates and who waits for whom; and what can be wrong with that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, assert_never

from swarmx.core.errors import WorkflowError
from swarmx.workflows.functions import FUNCTIONS
from swarmx.workflows.limits import NESTING, NODES_DEFINED
from swarmx.workflows.nodes import (
    BranchNode,
    Case,
    ImageNode,
    JoinNode,
    LlmNode,
    LoopNode,
    MapNode,
    Node,
    Otherwise,
    ToolNode,
    WorkflowSpec,
)
from swarmx.workflows.templates import Template, compile_expression, compile_template, references
from swarmx.workflows.values import nearest

_RESERVED = frozenset(
    {"inputs", "item", "iteration", "previous", "true", "false", "none", "and", "or", "not", "if", "else", "in", "is"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One node, compiled. `needs` are the siblings that must be finished before it.

    `templates` holds the compiled fields by name, those of a branch's bodies with the body's number behind it
    ("when[0]"); in `args` of a tool, every text is a Template. A map or loop has one of `bodies`, a branch one a case.
    """

    id: str
    node: Node
    needs: tuple[str, ...]
    templates: dict[str, Template]
    args: dict[str, Any] = field(default_factory=dict)
    bodies: tuple[Body, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The nodes of one scope, in the order of the definition; `dependents` inverts `needs`."""

    steps: dict[str, Step]
    dependents: dict[str, tuple[str, ...]]

    @property
    def last(self) -> str:
        """The node whose output is the scope's result where none is declared."""
        return next(reversed(self.steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A whole definition, compiled."""

    spec: WorkflowSpec
    body: Body
    outputs: dict[str, Template]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong in a definition; `where` is a path such as "nodes.plan.prompt"."""

    where: str
    message: str


def build_graph(spec: WorkflowSpec) -> tuple[Graph, list[Problem]]:
    """Compile the definition. The graph may be run only if there are no problems."""
    builder = _Builder(spec)
    view = _View(visible=frozenset({"inputs", *spec.nodes}), enclosing=frozenset())
    body, _ = builder.body(spec.nodes, "nodes", view)
    outputs = {name: builder.template(source, f"outputs.{name}", view) for name, source in spec.outputs.items()}
    if builder.count > NODES_DEFINED:
        builder.problem("nodes", f"{builder.count} nodes are defined, at most {NODES_DEFINED} may be; use a map")
    return Graph(spec=spec, body=body, outputs=outputs), builder.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What a template may name (`visible`), and the ids of the map, loop and branch nodes around it."""

    visible: frozenset[str]
    enclosing: frozenset[str]


class _Builder:
    def __init__(self, spec: WorkflowSpec) -> None:
        self.inputs = frozenset(spec.inputs)
        self.owners = dict(_owners(spec.nodes, None))
        self.problems: list[Problem] = []
        self.count = 0

    def problem(self, where: str, message: str) -> None:
        self.problems.append(Problem(where=where, message=message))

    def body(self, nodes: Mapping[str, Node], where: str, view: _View) -> tuple[Body, frozenset[str]]:
        """Compile one scope; also return the names that it reads from outside itself."""
        steps: dict[str, Step] = {}
        outside: set[str] = set()
        for id, node in nodes.items():
            self.count += 1
            at = f"{where}.{id}"
            if id in _RESERVED:
                self.problem(at, f"{id!r} has a meaning of its own in templates; choose another id")
            names: set[str] = set()
            templates, args, inner = self.fields(id, node, at, view, names)
            for need in node.needs:
                self.name(need, f"{at}.needs", view, nodes.keys())
            names.update(node.needs)
            needs = tuple(sibling for sibling in nodes if sibling in names)
            steps[id] = Step(id=id, node=node, needs=needs, templates=templates, args=args, bodies=inner)
            outside |= names - nodes.keys()
        dependents: dict[str, list[str]] = {id: [] for id in nodes}
        for step in steps.values():
            for need in step.needs:
                dependents[need].append(step.id)
        cycle = _cycle(steps)
        if cycle:
            self.problem(f"{where}.{cycle[0]}", f"the nodes wait for each other in a circle: {' -> '.join(cycle)}")
        return Body(steps=steps, dependents={id: tuple(ids) for id, ids in dependents.items()}), frozenset(outside)

    def fields(
        self, id: str, node: Node, at: str, view: _View, names: set[str]
    ) -> tuple[dict[str, Template], dict[str, Any], tuple[Body, ...]]:
        """Compile a node's fields and add what they read from the node's own scope to `names`."""
        templates: dict[str, Template] = {}
        match node:
            case LlmNode():
                if node.system is not None:
                    templates["system"] = self.template(node.system, f"{at}.system", view)
                templates["prompt"] = self.template(node.prompt, f"{at}.prompt", view)
            case ImageNode():
                templates["prompt"] = self.template(node.prompt, f"{at}.prompt", view)
                for name, value in (("steps", node.steps), ("width", node.width), ("height", node.height)):
                    if isinstance(value, str):
                        templates[name] = self.template(value, f"{at}.{name}", view, expression=True)
            case ToolNode():
                self.check_function(node, at)
                args = {
                    name: self.literal(value, f"{at}.args.{name}", view, names) for name, value in node.args.items()
                }
                return {}, args, ()
            case JoinNode():
                for need in node.of:
                    self.name(need, f"{at}.of", view, view.visible)
                names.update(node.of)
            case MapNode():
                templates["over"] = self.template(node.over, f"{at}.over", view, expression=True)
                if node.item != "item" and (node.item in _RESERVED or node.item in self.owners):
                    self.problem(
                        f"{at}.as", f"{node.item!r} is a node or has a meaning of its own; choose another name"
                    )
                names |= templates["over"].names
                inner = (self.nest(id, node, at, view, frozenset({node.item}), templates, names),)
                return templates, {}, inner
            case LoopNode():
                inner = (self.nest(id, node, at, view, frozenset({"iteration", "previous"}), templates, names),)
                return templates, {}, inner
            case BranchNode():
                return templates, {}, tuple(self.cases(id, node, at, view, templates, names))
            case _:
                assert_never(node)
        for template in templates.values():
            names |= template.names
        return templates, {}, ()

    def cases(
        self, id: str, node: BranchNode, at: str, view: _View, templates: dict[str, Template], names: set[str]
    ) -> Iterator[Body]:
        for number, case in enumerate(node.bodies):
            where = f"{at}.cases.{number}" if isinstance(case, Case) else f"{at}.else"
            if isinstance(case, Case):
                when = self.template(case.when, f"{where}.when", view, expression=True)
                templates[f"when[{number}]"] = when
                names |= when.names
            yield self.nest(id, case, where, view, frozenset(), templates, names, suffix=f"[{number}]")

    def nest(
        self,
        id: str,
        node: MapNode | LoopNode | Case | Otherwise,
        at: str,
        view: _View,
        own: frozenset[str],
        templates: dict[str, Template],
        names: set[str],
        *,
        suffix: str = "",
    ) -> Body:
        """Compile a body inside the node `id`, in which the names `own` are known, too."""
        if len(view.enclosing) >= NESTING:
            message = f"maps, loops and branches may nest {NESTING} deep, this is one more; take it out of its body"
            self.problem(at, message)
        for child in sorted(node.do.keys() & view.visible):
            self.problem(f"{at}.do.{child}", f"{child!r} is already the name of something around it; choose another id")
        within = _View(visible=view.visible - {id} | own | node.do.keys(), enclosing=view.enclosing | {id})
        body, outside = self.body(node.do, f"{at}.do", within)
        names |= outside - own
        if node.result is not None:
            templates[f"result{suffix}"] = self.template(node.result, f"{at}.result", within)
        if isinstance(node, LoopNode) and node.until is not None:
            templates["until"] = self.template(node.until, f"{at}.until", within, expression=True)
        for field_name in (f"result{suffix}", "until"):
            if field_name in templates:
                names |= templates[field_name].names - own - node.do.keys()
        return body

    def template(self, source: str, where: str, view: _View, *, expression: bool = False) -> Template:
        try:
            compiled = compile_expression(source) if expression else compile_template(source)
        except WorkflowError as error:
            self.problem(where, error.detail)
            return _EMPTY
        for name in sorted(references(compiled)):
            self.name(name, where, view, view.visible)
        for name in sorted(compiled.inputs - self.inputs):
            known = ", ".join(sorted(self.inputs)) or "none"
            self.problem(where, f"there is no input {name!r}{nearest(name, self.inputs)}; declared inputs: {known}")
        return compiled

    def literal(self, value: Any, where: str, view: _View, names: set[str]) -> Any:
        """A tool argument with its texts compiled."""
        match value:
            case str():
                template = self.template(value, where, view)
                names |= template.names
                return template
            case list():
                return [self.literal(child, f"{where}[{i}]", view, names) for i, child in enumerate(value)]
            case dict():
                return {key: self.literal(child, f"{where}.{key}", view, names) for key, child in value.items()}
            case _:
                return value

    def check_function(self, node: ToolNode, at: str) -> None:
        function = FUNCTIONS.get(node.function)
        if function is None:
            hint = nearest(node.function, set(FUNCTIONS))
            message = f"there is no function {node.function!r}{hint}; functions are {', '.join(sorted(FUNCTIONS))}"
            self.problem(f"{at}.function", message)
            return
        takes = ", ".join([*function.required, *(f"{name} (optional)" for name in function.optional)])
        for name in sorted(node.args.keys() - {*function.required, *function.optional}):
            self.problem(f"{at}.args.{name}", f"{node.function} takes no argument {name!r}; it takes {takes}")
        for name in function.required:
            if name not in node.args:
                self.problem(f"{at}.args", f"{node.function} needs the argument {name!r}; it takes {takes}")

    def name(self, name: str, where: str, view: _View, known: Iterable[str]) -> None:
        """Check one reference."""
        if name in known:
            return
        owner = self.owners.get(name)
        if name in view.enclosing:
            message = f"{name!r} encloses this node and is not finished before it"
        elif owner is not None:
            message = f"{name!r} is inside {owner!r} and not visible here; refer to the results of {owner!r}"
        elif name in ("iteration", "previous"):
            message = f"{name!r} is known inside a loop only"
        elif name == "item":
            message = "'item' is known only inside a map that does not rename it with `as`"
        else:
            message = (
                f"there is nothing called {name!r}{nearest(name, set(known))}; known here: {', '.join(sorted(known))}"
            )
        self.problem(where, message)


def _owners(nodes: Mapping[str, Node], owner: str | None) -> Iterator[tuple[str, str | None]]:
    for id, node in nodes.items():
        yield id, owner
        if isinstance(node, MapNode | LoopNode):
            yield from _owners(node.do, id)
        elif isinstance(node, BranchNode):
            for case in node.bodies:
                yield from _owners(case.do, id)


def _cycle(steps: Mapping[str, Step]) -> list[str]:
    """The ids along a circle, first and last the same, or nothing."""
    waiting = {id: len(step.needs) for id, step in steps.items()}
    free = [id for id, count in waiting.items() if count == 0]
    dependents: dict[str, list[str]] = {id: [] for id in steps}
    for step in steps.values():
        for need in step.needs:
            dependents[need].append(step.id)
    while free:
        for dependent in dependents[free.pop()]:
            waiting[dependent] -= 1
            if waiting[dependent] == 0:
                free.append(dependent)
    stuck = [id for id, count in waiting.items() if count > 0]
    if not stuck:
        return []
    path = [stuck[0]]
    while True:
        path.append(next(need for need in steps[path[-1]].needs if waiting[need] > 0))
        if path[-1] in path[:-1]:
            circle = path[path.index(path[-1]) :]
            return circle[::-1]


_EMPTY = compile_template("")

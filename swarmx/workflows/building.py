"""From a checked form to a graph: templates are compiled, references resolved, and what is wrong is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, assert_never

from swarmx.core.errors import WorkflowError
from swarmx.workflows import agent_tools
from swarmx.workflows.functions import FUNCTIONS
from swarmx.workflows.graph import Body, Graph, Problem, Step, signals_of
from swarmx.workflows.limits import NESTING, NODES_DEFINED
from swarmx.workflows.nodes import (
    AgentNode,
    BranchNode,
    Case,
    Definition,
    ImageNode,
    JoinNode,
    LlmNode,
    LoopNode,
    MapNode,
    Node,
    Otherwise,
    SubNode,
    ToolNode,
    WorkflowSpec,
)
from swarmx.workflows.subworkflows import in_order
from swarmx.workflows.templates import Template, compile_expression, compile_template, references
from swarmx.workflows.values import nearest

_RESERVED = frozenset(
    {"inputs", "item", "iteration", "previous", "true", "false", "none", "and", "or", "not", "if", "else", "in", "is"}
)


def build_graph(spec: WorkflowSpec) -> tuple[Graph, list[Problem]]:
    """Compile the definition. The graph may be run only if there are no problems."""
    order, circle = in_order(spec.workflows)
    builder = _Builder(spec)
    if circle:
        message = f"the workflows use each other in a circle: {' -> '.join(circle)}; none may come to use itself"
        builder.problem(f"workflows.{circle[0]}", message)
    for name in order:
        builder.workflows[name] = builder.whole(spec.workflows[name], f"workflows.{name}.")
    graph = Graph(spec=spec, body=builder.whole(spec, ""))
    if builder.count > NODES_DEFINED:
        builder.problem("nodes", f"{builder.count} nodes are defined, at most {NODES_DEFINED} may be; use a map")
    return graph, builder.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What a template may name (`visible`), and the ids of the map, loop and branch nodes around it."""

    visible: frozenset[str]
    enclosing: frozenset[str]


class _Builder:
    def __init__(self, spec: WorkflowSpec) -> None:
        self.spec = spec
        self.workflows: dict[str, Body] = {}
        self.inputs: frozenset[str] = frozenset()
        self.owners: dict[str, str | None] = {}
        self.problems: list[Problem] = []
        self.count = 0

    def whole(self, definition: Definition, where: str) -> Body:
        """Compile a workflow, with all names of its own but for the signals."""
        self.inputs = frozenset(definition.inputs)
        self.owners = dict(_owners(definition.nodes, None))
        visible = {"inputs", *definition.nodes} | ({"signals"} if self.spec.signals else set())
        view = _View(visible=frozenset(visible), enclosing=frozenset())
        body, _ = self.body(definition.nodes, f"{where}nodes", view)
        outputs = {
            name: self.template(source, f"{where}outputs.{name}", view) for name, source in definition.outputs.items()
        }
        return replace(body, outputs=outputs)

    def problem(self, where: str, message: str) -> None:
        self.problems.append(Problem(where=where, message=message))

    def body(self, nodes: Mapping[str, Node], where: str, view: _View) -> tuple[Body, frozenset[str]]:
        """Compile one scope; also return the names that it reads from outside itself."""
        steps: dict[str, Step] = {}
        outside: set[str] = set()
        for id, node in nodes.items():
            self.count += 1
            at = f"{where}.{id}"
            if id in _RESERVED or (id == "signals" and self.spec.signals):
                self.problem(at, f"{id!r} has a meaning of its own in templates; choose another id")
            names: set[str] = set()
            templates, args, inner = self.fields(id, node, at, view, names)
            for need in node.needs:
                self.name(need, f"{at}.needs", view, nodes.keys())
            names.update(node.needs)
            needs = tuple(sibling for sibling in nodes if sibling in names)
            closing = {name for name in templates if name == "until" or name.startswith("result")}
            ended = () if isinstance(node, AgentNode) else inner  # what an agent may use waits for itself
            steps[id] = Step(
                id=id,
                node=node,
                needs=needs,
                templates=templates,
                args=args,
                bodies=inner,
                opening=signals_of(templates[name] for name in templates if name not in closing)
                | signals_of(_within(args)),
                closing=signals_of(templates[name] for name in closing).union(*(body.closing for body in ended)),
            )
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
            case LlmNode() | AgentNode():
                if isinstance(node, AgentNode):
                    for field_name, message in agent_tools.problems(node, self.spec.workflows.keys()):
                        self.problem(f"{at}.{field_name}", message)
                if node.system is not None:
                    templates["system"] = self.template(node.system, f"{at}.system", view)
                templates["prompt"] = self.template(node.prompt, f"{at}.prompt", view)
            case ImageNode():
                templates["prompt"] = self.template(node.prompt, f"{at}.prompt", view)
                for name, value in (("steps", node.steps), ("width", node.width), ("height", node.height)):
                    if isinstance(value, str):
                        templates[name] = self.template(value, f"{at}.{name}", view, expression=True)
            case ToolNode():
                if node.function is not None:
                    self.check_function(node.function, node.args, at)
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
            case SubNode():
                args = {
                    name: self.literal(value, f"{at}.inputs.{name}", view, names) for name, value in node.inputs.items()
                }
                return {}, args, tuple(self.use(node, at))
            case _:
                assert_never(node)
        for template in templates.values():
            names |= template.names
        used = node.workflows if isinstance(node, AgentNode) else ()
        return templates, {}, tuple(self.workflows[name] for name in used if name in self.workflows)

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

    def use(self, node: SubNode, at: str) -> Iterator[Body]:
        """Check what a sub-workflow is given; its body, unless it is in a circle."""
        definition = self.spec.workflows.get(node.use)
        if definition is None:
            known = ", ".join(sorted(self.spec.workflows)) or "none; define it under `workflows`"
            hint = nearest(node.use, set(self.spec.workflows))
            self.problem(f"{at}.use", f"there is no workflow {node.use!r}{hint}; workflows are {known}")
            return
        for name in sorted(node.inputs.keys() - definition.inputs.keys()):
            known = ", ".join(sorted(definition.inputs)) or "none"
            hint = nearest(name, set(definition.inputs))
            self.problem(f"{at}.inputs.{name}", f"{node.use} declares no input {name!r}{hint}; inputs: {known}")
        for name, default in definition.inputs.items():
            if default is None and name not in node.inputs:
                self.problem(f"{at}.inputs", f"{node.use} needs the input {name!r}, which has no default")
        if node.use in self.workflows:
            yield self.workflows[node.use]

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
        if self.spec.signals and "signals" in compiled.names:
            known = ", ".join(sorted(self.spec.signals))
            for name in sorted(compiled.signals - self.spec.signals.keys()):
                hint = nearest(name, set(self.spec.signals))
                self.problem(where, f"there is no signal {name!r}{hint}; declared signals: {known}")
            if "signals" in compiled.whole:
                self.problem(where, "`signals` needs the name of one, such as signals.NAME, which is then waited for")
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

    def check_function(self, name: str, args: Mapping[str, Any], at: str) -> None:
        function = FUNCTIONS.get(name)
        if function is None:
            hint = nearest(name, set(FUNCTIONS))
            message = f"there is no function {name!r}{hint}; functions are {', '.join(sorted(FUNCTIONS))}"
            self.problem(f"{at}.function", message)
            return
        takes = ", ".join([*function.required, *(f"{name} (optional)" for name in function.optional)])
        for arg in sorted(args.keys() - {*function.required, *function.optional}):
            self.problem(f"{at}.args.{arg}", f"{name} takes no argument {arg!r}; it takes {takes}")
        for arg in function.required:
            if arg not in args:
                self.problem(f"{at}.args", f"{name} needs the argument {arg!r}; it takes {takes}")

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
        elif name == "signals":
            message = "no signals are declared; add them to the definition as `signals: {NAME: {}}`"
        elif name == "null":
            message = "'null' is called none in expressions"
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


def _within(value: Any) -> Iterator[Template]:
    """The templates in a tool argument."""
    match value:
        case Template():
            yield value
        case list():
            for child in value:
                yield from _within(child)
        case dict():
            for child in value.values():
                yield from _within(child)
        case _:
            pass


_EMPTY = compile_template("")

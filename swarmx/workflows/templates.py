"""Templates: a bounded, side-effect-free part of Jinja in which JSON values meet text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2 import Template as JinjaTemplate
from jinja2.exceptions import UndefinedError
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from swarmx.core.errors import WorkflowError
from swarmx.workflows.functions import FUNCTIONS, call_function
from swarmx.workflows.limits import TEMPLATE_BYTES, TEMPLATE_DEPTH, TEMPLATE_OPERATIONS, TEMPLATE_PARTS, TEXT_CHARS
from swarmx.workflows.values import Json, as_text, checked, nearest

_PARTS = "_parts"  # no node id starts with an underscore, so nothing that a template names collides with it
_MAX_POWER = 64

_OPERATIONS: tuple[type[nodes.Node], ...] = (nodes.Filter, nodes.Test, nodes.BinExpr, nodes.UnaryExpr, nodes.Compare)
_ALLOWED: frozenset[type[nodes.Node]] = frozenset(
    {
        nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.List, nodes.Dict, nodes.Pair,
        nodes.Keyword, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.CondExpr, nodes.And,
        nodes.Or, nodes.Not, nodes.Compare, nodes.Operand, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv,
        nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos, nodes.Concat,
    }
)  # fmt: skip
_INSTEAD = {
    "For": "use a map node instead of a for loop",
    "If": "write {{ a if condition else b }} instead of an if block",
    "Assign": "compute the value in a tool node instead of setting a variable",
    "Call": "use a filter, such as {{ x | trim }}, instead of a call",
    "Tuple": "write a list in square brackets",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A checked template. `names` are the first-level names it reads, `inputs` the fields of `inputs` among them and
    `signals` those of `signals`; `whole` are those names that it reads without a field, as in `{{ inputs }}`.

    `native` says that it is one `{{ expression }}` and nothing else, so that it has a value that need not be text.
    """

    source: str
    names: frozenset[str]
    inputs: frozenset[str]
    signals: frozenset[str]
    whole: frozenset[str]
    native: bool
    _compiled: JinjaTemplate

    def value(self, context: dict[str, Json], *, where: str = "") -> Json:
        """The expression's own value where the template is nothing but an expression, else its text."""
        parts = self._parts(context, where)
        try:
            return checked(parts[0]) if self.native else _join(parts)
        except WorkflowError as error:
            raise WorkflowError(error.detail, where=where) from error

    def text(self, context: dict[str, Json], *, where: str = "") -> str:
        """The text; values that are not text appear as JSON."""
        parts = self._parts(context, where)
        try:
            return _join(parts)
        except WorkflowError as error:
            raise WorkflowError(error.detail, where=where) from error

    def _parts(self, context: dict[str, Json], where: str) -> list[Json]:
        try:
            run = Context(_ENVIRONMENT, context, None, {})  # all that `new_context` comes to without globals
            for _ in self._compiled.root_render_func(run):
                pass  # a template here writes nothing: it leaves the list of its parts in a variable
            parts: list[Json] = run.vars[_PARTS]
            for part in parts:
                if isinstance(part, Undefined):
                    str(part)  # StrictUndefined raises and says what is missing
        except UndefinedError as error:
            raise WorkflowError(f"{error.message}", where=where) from error
        except WorkflowError as error:
            raise WorkflowError(error.detail, where=where) from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise WorkflowError(
                f"the template {self.source[:60]!r} cannot be evaluated: {error}", where=where
            ) from error
        return parts


def compile_template(source: str, *, where: str = "") -> Template:
    """Check and compile a text with `{{ expressions }}`. Raises WorkflowError."""
    try:
        return _compile(source)
    except WorkflowError as error:
        raise WorkflowError(error.detail, where=where) from error


def compile_expression(source: str, *, where: str = "") -> Template:
    """Check and compile one expression, with or without its braces. Raises WorkflowError."""
    stripped = source.strip()
    template = compile_template(stripped if stripped.startswith("{{") else "{{ " + stripped + " }}", where=where)
    if not template.native:
        raise WorkflowError(f"one expression was expected, got the text {source[:60]!r}", where=where)
    return template


def references(template: Template) -> frozenset[str]:
    """The first-level names that the template reads: nodes, `inputs`, `item`, `iteration`, `previous`."""
    return template.names


class _Environment(ImmutableSandboxedEnvironment):
    """Values are JSON, so a name after a dot is a key, never a Python attribute; growth is bounded."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Undefined):
            str(obj)  # raises and says what is missing
        if isinstance(argument, Undefined):
            str(argument)
        if isinstance(obj, dict):
            if isinstance(argument, str) and argument in obj:
                return obj[argument]
            known = ", ".join(sorted(obj)[:12]) or "nothing"
            return self.undefined(f"there is no field {argument!r}, only {known}")
        if isinstance(obj, list | str):
            if isinstance(argument, slice):
                return obj[argument]
            if isinstance(argument, int) and -len(obj) <= argument < len(obj):
                return obj[argument]
            return self.undefined(f"there is no {argument!r} in a {_kind(obj)} of {len(obj)}")
        return self.undefined(f"there is no field {argument!r} in {_kind(obj)}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for side in (left, right):
            if isinstance(side, Undefined):
                str(side)
        if operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            if len(left) + len(right) > TEXT_CHARS:
                raise WorkflowError(f"the sum would be larger than {TEXT_CHARS} characters or items")
        elif not (_is_number(left) and _is_number(right)):
            raise WorkflowError(f"{operator} wants two numbers{' or two texts' if operator == '+' else ''}, "
                                f"got {_kind(left)} and {_kind(right)}")  # fmt: skip
        elif operator == "**" and not (abs(left) <= 2**31 and 0 <= right <= _MAX_POWER):
            raise WorkflowError(f"** wants a base up to 2^31 and an exponent from 0 to {_MAX_POWER}")
        elif any(isinstance(side, int) and side.bit_length() > 64 for side in (left, right)):
            raise WorkflowError("a whole number has become larger than 64 bits")
        return super().call_binop(context, operator, left, right)


class _BoundConcat(NodeTransformer):
    """`a ~ b` becomes the bounded function `concat`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802  # Jinja calls it by this name
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "concat", [], [], None, None, lineno=node.lineno)


def _filter(name: str) -> Any:
    parameters = FUNCTIONS[name].required + FUNCTIONS[name].optional

    def apply(value: Json, *positional: Json, **named: Json) -> Json:
        arguments = (value, *positional)
        if len(arguments) > len(parameters):
            raise WorkflowError(f"the filter {name} takes {len(parameters) - 1} arguments, got {len(positional)}")
        for argument in (*arguments, *named.values()):
            if isinstance(argument, Undefined):
                str(argument)
        return call_function(name, dict(zip(parameters, arguments, strict=False)) | named)

    return apply


def _default(value: Json, instead: Json = "") -> Json:
    return instead if isinstance(value, Undefined) or value is None else value


def _map(value: Json, attribute: str) -> Json:
    return call_function("pick", {"value": value if isinstance(value, list) else [value], "key": attribute})


def _environment() -> _Environment:
    environment = _Environment(undefined=StrictUndefined, autoescape=False, optimized=False, keep_trailing_newline=True)
    environment.globals = {}
    kept_tests = ("defined", "undefined", "none", "string", "number", "mapping", "true", "false", "odd", "even")
    environment.tests = {name: environment.tests[name] for name in kept_tests}
    environment.filters = {name: _filter(name) for name in FUNCTIONS}
    environment.filters |= {
        "default": _default,
        "map": _map,
        "join": environment.filters["concat"],
        "tojson": environment.filters["json_dump"],
    }
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=1024)
def _compile(source: str) -> Template:
    if len(source.encode("utf-8", "replace")) > TEMPLATE_BYTES:
        raise WorkflowError(f"a template may have {TEMPLATE_BYTES} bytes, this one has more; pass long texts as inputs")
    try:
        tree = _ENVIRONMENT.parse(source)
        _check(tree)
        parts: list[nodes.Expr] = []
        for part in _parts_of(tree):
            parts.append(nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part)
        names = frozenset(node.name for node in tree.find_all(nodes.Name))
        fields, whole = _reads(tree)
        native = len(parts) == 1 and not isinstance(_parts_of(tree)[0], nodes.TemplateData)
        target = nodes.Name(_PARTS, "store")
        assign = nodes.Assign(target, nodes.List(parts), lineno=1)
        bounded = _BoundConcat().visit(nodes.Template([assign], lineno=1))
        bounded.set_environment(_ENVIRONMENT)
        bounded.set_lineno(1)
        compiled = _ENVIRONMENT.from_string(bounded)
    except TemplateError as error:
        hint = _filter_hint(error.message or "")
        raise WorkflowError(f"the template is not valid: {error.message}{hint}") from error
    except (RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
        raise WorkflowError(f"the template cannot be read: {error}; make it simpler") from error
    return Template(
        source=source,
        names=names,
        inputs=frozenset(field for name, field in fields if name == "inputs"),
        signals=frozenset(field for name, field in fields if name == "signals"),
        whole=frozenset(whole),
        native=native,
        _compiled=compiled,
    )


def _parts_of(tree: nodes.Template) -> list[nodes.Expr]:
    return [part for output in tree.body if isinstance(output, nodes.Output) for part in output.nodes]


def _check(tree: nodes.Template) -> None:
    operations = parts = 0
    stack: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        parts += 1
        if parts > TEMPLATE_PARTS:
            raise WorkflowError(f"a template may have {TEMPLATE_PARTS} names and operators, this one has more")
        if type(node) not in _ALLOWED:
            name = type(node).__name__
            raise WorkflowError(f"templates know expressions only, not {name}; {_INSTEAD.get(name, 'leave it out')}")
        operations += isinstance(node, _OPERATIONS)
        if operations > TEMPLATE_OPERATIONS:
            raise WorkflowError(f"a template may have {TEMPLATE_OPERATIONS} filters and operators, this one has more")
        if depth > TEMPLATE_DEPTH:
            raise WorkflowError(f"a template may nest {TEMPLATE_DEPTH} levels deep, this one goes deeper")
        stack.extend((child, depth + 1) for child in node.iter_child_nodes())


def _reads(tree: nodes.Template) -> tuple[set[tuple[str, str]], set[str]]:
    """The names with the fields that are read of them, and the names of which no field of a known name is read."""
    fields: set[tuple[str, str]] = set()
    parents: set[int] = set()
    reads: list[nodes.Getattr | nodes.Getitem] = [*tree.find_all(nodes.Getattr), *tree.find_all(nodes.Getitem)]
    for read in reads:
        field = read.attr if isinstance(read, nodes.Getattr) else read.arg
        if isinstance(field, nodes.Const):
            field = field.value
        if isinstance(read.node, nodes.Name) and isinstance(field, str):
            fields.add((read.node.name, field))
            parents.add(id(read.node))
    return fields, {name.name for name in tree.find_all(nodes.Name) if id(name) not in parents}


def _filter_hint(message: str) -> str:
    if not message.startswith("No filter named"):
        return ""
    name = message.split("'")[1]
    return f"{nearest(name, set(_ENVIRONMENT.filters))}; filters are {', '.join(sorted(_ENVIRONMENT.filters))}"


def _join(parts: list[Json]) -> str:
    texts: list[str] = []
    size = 0
    for part in parts:
        texts.append(as_text(part))
        size += len(texts[-1])
        if size > TEXT_CHARS:
            raise WorkflowError(f"the text is longer than {TEXT_CHARS} characters; hand on less")
    return "".join(texts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    match value:
        case str():
            return "text"
        case list():
            return "list"
        case dict():
            return "mapping"
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case None:
            return "none"
        case _:
            return "nothing"

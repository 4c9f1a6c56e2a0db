"""The form of a declared workflow, one model a node kind: what a field may hold (what it may refer to is in graph)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import PASSING, PassingCause
from swarmx.core.nouns import PRIORITIES
from swarmx.workflows.limits import NESTING, NODES_EXPANDED, RETRIES
from swarmx.workflows.values import checked

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$")]
Model = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, StringConstraints(min_length=1)]
KINDS = ("llm", "image", "tool", "map", "loop", "branch", "join")


def _size(low: int, high: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, str) and "{{" in value:
            return value
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise ValueError(f"a whole number from {low} to {high}, or a template that gives one, was expected")

    return BeforeValidator(check)


STEPS = (1, 200)
SIDE = (64, 4096)
Steps = Annotated[int | str, _size(*STEPS)]
Side = Annotated[int | str, _size(*SIDE)]

_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


# pydantic turns ValueError into a problem at its place, and lets TypeError through
def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), dict):
        raise ValueError("a JSON schema with `type: object` and `properties` was expected")
    _check_schema(_json(schema), "")
    return schema


def _check_schema(schema: Any, at: str) -> None:
    if not isinstance(schema, dict):
        raise ValueError(f"the schema of {at or 'the answer'} is not a mapping")
    if "$ref" in schema or "$dynamicRef" in schema:
        raise ValueError(f"$ref is not supported (at {at or 'the top'}); write the schema out")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            raise ValueError(f"{kind!r} is no JSON type (at {at or 'the top'}); types are {', '.join(sorted(_TYPES))}")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise ValueError(f"properties must be a mapping (at {at or 'the top'})")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        raise ValueError(f"required may list only names from properties (at {at or 'the top'})")
    for name, child in properties.items():
        _check_schema(child, f"{at}.{name}" if at else name)
    if "items" in schema:
        _check_schema(schema["items"], f"{at}[]")


def _json(value: Any) -> Any:
    try:
        return checked(value)
    except WorkflowError as error:
        raise ValueError(error.detail) from error


JsonSchema = Annotated[dict[str, Any], AfterValidator(_json_schema)]
JsonMapping = Annotated[dict[str, Any], AfterValidator(_json)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Retry(_Form):
    """How often a node is attempted, the first time included, and how long it rests in between."""

    attempts: int = Field(default=3, ge=1, le=10)
    backoff_s: float = Field(default=1.0, ge=0.0, le=3600.0, allow_inf_nan=False)
    factor: float = Field(default=2.0, ge=1.0, le=10.0, allow_inf_nan=False)
    max_s: float = Field(default=60.0, ge=0.0, le=86400.0, allow_inf_nan=False)
    on: list[PassingCause] = list(PASSING)


class _CallNode(_Form):
    needs: list[Name] = []
    retry: Retry | None = None
    timeout_s: float | None = Field(default=None, gt=0.0, le=86400.0, allow_inf_nan=False)


class LlmNode(_CallNode):
    """One chat completion. Leaves {"text", "json", "usage"}."""

    kind: Literal["llm"]
    model: Model
    role: Label = "assistant"
    system: Text | None = None
    prompt: Text
    max_tokens: int = Field(default=512, ge=1, le=32768)
    temperature: float = Field(default=0.7, ge=0.0, le=2.0)
    json_schema: JsonSchema | None = Field(default=None, alias="schema")


class ImageNode(_CallNode):
    """One image generation. Leaves {"images": [{"sha256", "media_type", "bytes"}]}."""

    kind: Literal["image"]
    model: Model
    role: Label = "artist"
    prompt: Text
    steps: Steps = 20
    width: Side = 512
    height: Side = 512
    n: int = Field(default=1, ge=1, le=4)


class ToolNode(_Form):
    """One call of a built-in pure function. Leaves what it returns."""

    kind: Literal["tool"]
    needs: list[Name] = []
    function: str
    args: JsonMapping = {}


class MapNode(_Form):
    """Its body once for every item of a list, all at once. Leaves the list of results in the order of the items."""

    kind: Literal["map"]
    needs: list[Name] = []
    over: Text
    item: Name = Field(default="item", alias="as")
    do: dict[Name, Node] = Field(min_length=1)
    result: Text | None = None
    max_items: int = Field(default=32, ge=1, le=2000)


class LoopNode(_Form):
    """Its body again and again until a condition holds or the iterations are used up. Leaves its last result."""

    kind: Literal["loop"]
    needs: list[Name] = []
    do: dict[Name, Node] = Field(min_length=1)
    until: Text | None = None
    max_iterations: int = Field(ge=1, le=20)
    result: Text | None = None


class Case(_Form):
    """The body that a branch takes when the condition holds."""

    when: Text
    do: dict[Name, Node] = Field(min_length=1)
    result: Text | None = None


class Otherwise(_Form):
    """The body that a branch takes when no condition holds."""

    do: dict[Name, Node] = Field(min_length=1)
    result: Text | None = None


class BranchNode(_Form):
    """The body of the first case whose condition holds, else `else`. Leaves its result; null where none was taken."""

    kind: Literal["branch"]
    needs: list[Name] = []
    cases: list[Case] = Field(min_length=1, max_length=20)
    otherwise: Otherwise | None = Field(default=None, alias="else")

    @property
    def bodies(self) -> tuple[Case | Otherwise, ...]:
        """All cases, then the else if there is one."""
        return (*self.cases, self.otherwise) if self.otherwise is not None else tuple(self.cases)


class JoinNode(_Form):
    """Waits for several nodes. Leaves the list of their outputs."""

    kind: Literal["join"]
    needs: list[Name] = []
    of: list[Name] = Field(min_length=1)


Node = Annotated[
    LlmNode | ImageNode | ToolNode | MapNode | LoopNode | BranchNode | JoinNode, Field(discriminator="kind")
]


class Limits(_Form):
    """What one run may come to, below what any may."""

    nodes: int = Field(default=NODES_EXPANDED, ge=1, le=NODES_EXPANDED)
    depth: int = Field(default=NESTING, ge=1, le=NESTING)
    fan_out: int = Field(default=NODES_EXPANDED, ge=1, le=NODES_EXPANDED)
    retries: int = Field(default=32, ge=0, le=RETRIES)


class WorkflowSpec(_Form):
    """A whole declared workflow. An input whose value is null must be given with each run; others have a default."""

    name: Label
    kind: Label = "default"
    deadline_s: float | None = Field(default=None, gt=0.0, le=30 * 86400.0, allow_inf_nan=False)
    priority: int = Field(default=0, ge=PRIORITIES[0], le=PRIORITIES[-1])
    limits: Limits = Limits()
    inputs: JsonMapping = {}
    nodes: dict[Name, Node] = Field(min_length=1)
    outputs: dict[Name, Text] = {}

    def to_json(self) -> str:
        """The definition as JSON with every default written out; it parses to an equal one."""
        return self.model_dump_json(by_alias=True)


NODE_MODELS: dict[str, type[_Form]] = {
    "llm": LlmNode,
    "image": ImageNode,
    "tool": ToolNode,
    "map": MapNode,
    "loop": LoopNode,
    "branch": BranchNode,
    "join": JoinNode,
}
PART_MODELS: dict[str, type[_Form]] = {"retry": Retry, "limits": Limits, "cases": Case, "else": Otherwise}
"""The forms of fields that are forms of their own, by the field's name."""


def field_names(model: type[BaseModel]) -> frozenset[str]:
    """The names of a model's fields as authors write them."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())

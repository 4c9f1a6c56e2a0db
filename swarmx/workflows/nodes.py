"""The form of a declared workflow, a model a node kind: what a field may hold (what it may refer to is in building)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import PASSING, PassingCause
from swarmx.core.nouns import PRIORITIES
from swarmx.workflows.limits import DEPTH, NODES_EXPANDED, RETRIES, SIGNALS, WORKFLOWS
from swarmx.workflows.schemas import ObjectSchema, ValueSchema, check_value, is_new
from swarmx.workflows.values import checked

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$")]
Model = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, StringConstraints(min_length=1)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,127}$")]
KINDS = ("llm", "image", "tool", "agent", "map", "loop", "branch", "join", "workflow")


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


# pydantic turns ValueError into a problem at its place, and lets TypeError through
def _json(value: Any) -> Any:
    try:
        return checked(value)
    except WorkflowError as error:
        raise ValueError(error.detail) from error


JsonMapping = Annotated[dict[str, Any], AfterValidator(_json)]
JsonValue = Annotated[Any, AfterValidator(_json)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Retry(_Form):
    """How often a node is attempted, the first time included, and how long it rests in between."""

    attempts: int = Field(default=3, ge=1, le=10)
    backoff_s: float = Field(default=1.0, ge=0.0, le=3600.0, allow_inf_nan=False)
    factor: float = Field(default=2.0, ge=1.0, le=10.0, allow_inf_nan=False)
    max_s: float = Field(default=60.0, ge=0.0, le=86400.0, allow_inf_nan=False)
    jitter: float = Field(default=0.5, ge=0.0, le=1.0, allow_inf_nan=False)
    on: list[PassingCause | Literal["interrupted"]] = list(PASSING)


class Budget(_Form):
    """What a node, with all that is inside it, or a whole run may use up; what is not set is not bounded.

    Tokens count prompts and answers, steps every attempt at a call, money by the server's prices.
    """

    tokens: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    money: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    replica_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)


class Signal(_Form):
    """A value that comes from outside while the workflow runs. Without a default (null), it must come in time."""

    timeout_s: float | None = Field(default=None, gt=0.0, le=30 * 86400.0, allow_inf_nan=False)
    default: JsonValue = None
    json_schema: ValueSchema | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _default_fits(self, info: ValidationInfo) -> Self:
        if self.default is not None and self.timeout_s is None:
            raise ValueError("a default is taken when timeout_s is over; set one, or leave the default out")
        if is_new(info) and self.default is not None and self.json_schema is not None:
            try:
                check_value(self.default, self.json_schema, "the default")
            except WorkflowError as error:
                raise ValueError(error.detail) from error
        return self


class _CallNode(_Form):
    needs: list[Name] = []
    budget: Budget | None = None
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
    json_schema: ObjectSchema | None = Field(default=None, alias="schema")


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


class ToolNode(_CallNode):
    """One call of a built-in pure function, or of a tool that replicas have. Leaves what it returns."""

    kind: Literal["tool"]
    function: str | None = None
    tool: ToolName | None = None
    args: JsonMapping = {}

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.function is None) == (self.tool is None):
            raise ValueError("exactly one of `function` and `tool` was expected")
        if self.tool is None and (self.retry is not None or self.timeout_s is not None):
            raise ValueError("`retry` and `timeout_s` are for a `tool`; a `function` gives the same at once, each time")
        return self


class AgentNode(_CallNode):
    """A model that calls tools until it has an answer. Leaves {"text", "json", "steps", "usage"}.

    `retry` and `timeout_s` hold for each of its calls; a step is one call of the model, with what it asks for.
    Prompt and answer of a step share `context_tokens`; what is too long is shortened. Without them, nothing is.
    """

    kind: Literal["agent"]
    model: Model
    role: Label = "agent"
    system: Text | None = None
    prompt: Text
    tools: list[ToolName] = Field(default=[], max_length=64)
    functions: list[str] = Field(default=[], max_length=64)
    workflows: list[Name] = Field(default=[], max_length=16)
    json_schema: ObjectSchema | None = Field(default=None, alias="schema")
    max_steps: int = Field(default=8, ge=1, le=50)
    parallel_tools: int = Field(default=4, ge=1, le=16)
    result_chars: int = Field(default=16_000, ge=100, le=200_000)
    # left out of what is stored where it is not set: such a definition keeps the hash that it always had
    context_tokens: int | None = Field(default=None, ge=256, le=10_000_000, exclude_if=lambda value: value is None)
    max_tokens: int = Field(default=512, ge=1, le=32768)
    temperature: float = Field(default=0.7, ge=0.0, le=2.0)

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> Self:
        if self.context_tokens is not None and self.context_tokens <= self.max_tokens:
            raise ValueError(
                f"context_tokens ({self.context_tokens}) is for prompt and answer together, and should be more than "
                f"max_tokens ({self.max_tokens})"
            )
        return self


class TurnNode(LlmNode):
    """One step of an agent: its model is asked, with all that came before. A `last` one has to answer."""

    agent: AgentNode
    last: bool


class UseNode(_CallNode):
    """One tool that the model of an agent asked for, by the name and with the arguments that it wrote."""

    kind: Literal["tool"]
    agent: AgentNode
    name: str
    arguments: str


class MapNode(_Form):
    """Its body once for every item of a list, all at once. Leaves the list of results in the order of the items."""

    kind: Literal["map"]
    needs: list[Name] = []
    budget: Budget | None = None
    over: Text
    item: Name = Field(default="item", alias="as")
    do: dict[Name, Node] = Field(min_length=1)
    result: Text | None = None
    max_items: int = Field(default=32, ge=1, le=2000)


class LoopNode(_Form):
    """Its body again and again until a condition holds or the iterations are used up. Leaves its last result."""

    kind: Literal["loop"]
    needs: list[Name] = []
    budget: Budget | None = None
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
    budget: Budget | None = None
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


class SubNode(_Form):
    """A workflow of the same definition, inside this one. Leaves its outputs."""

    kind: Literal["workflow"]
    needs: list[Name] = []
    budget: Budget | None = None
    use: Name
    inputs: JsonMapping = {}


Node = Annotated[
    LlmNode | ImageNode | ToolNode | AgentNode | MapNode | LoopNode | BranchNode | JoinNode | SubNode,
    Field(discriminator="kind"),
]
AnyNode = Node | TurnNode | UseNode
"""A node of a run: as its author wrote it, or a part of one that only runs have."""


class Limits(_Form):
    """What one run may come to, below what any may."""

    nodes: int = Field(default=NODES_EXPANDED, ge=1, le=NODES_EXPANDED)
    depth: int = Field(default=DEPTH, ge=1, le=DEPTH)
    fan_out: int = Field(default=NODES_EXPANDED, ge=1, le=NODES_EXPANDED)
    retries: int = Field(default=32, ge=0, le=RETRIES)


class Definition(_Form):
    """Nodes with what goes in and out. An input whose value is null must be given with each run; others have a default.

    A workflow is one, and so is each that is used inside it. By its `description`, an agent's model chooses it.
    """

    description: str = Field(default="", max_length=4000)
    inputs: JsonMapping = {}
    nodes: dict[Name, Node] = Field(min_length=1)
    outputs: dict[Name, Text] = {}


class WorkflowSpec(Definition):
    """A whole declared workflow."""

    name: Label
    kind: Label = "default"
    deadline_s: float | None = Field(default=None, gt=0.0, le=30 * 86400.0, allow_inf_nan=False)
    priority: int = Field(default=0, ge=PRIORITIES[0], le=PRIORITIES[-1])
    limits: Limits = Limits()
    budget: Budget | None = None
    signals: dict[Name, Signal] = Field(default={}, max_length=SIGNALS)
    workflows: dict[Name, Definition] = Field(default={}, max_length=WORKFLOWS)

    def to_json(self) -> str:
        """The definition as JSON with its defaults written out; it parses to an equal one."""
        return self.model_dump_json(by_alias=True)


NODE_MODELS: dict[str, type[_Form]] = {
    "llm": LlmNode,
    "image": ImageNode,
    "tool": ToolNode,
    "agent": AgentNode,
    "map": MapNode,
    "loop": LoopNode,
    "branch": BranchNode,
    "join": JoinNode,
    "workflow": SubNode,
}
PART_MODELS: dict[str, type[_Form]] = {
    "retry": Retry,
    "limits": Limits,
    "budget": Budget,
    "cases": Case,
    "else": Otherwise,
}
"""The forms of fields that are forms of their own, by the field's name."""
NAMED_MODELS: dict[str, type[_Form]] = {"signals": Signal, "workflows": Definition}
"""The forms of what stands under a name of the author's, by the field that has the names."""


def field_names(model: type[BaseModel]) -> frozenset[str]:
    """The names of a model's fields as authors write them."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())

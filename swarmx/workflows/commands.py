"""What is decided about one node, as commands, and what all such decisions have in common."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from swarmx.core.errors import ConfigError, WorkflowError
from swarmx.core.nouns import CallKind
from swarmx.core.toolbox import ToolSpec
from swarmx.workflows.arguments import Arguments
from swarmx.workflows.events import Event, NodeExpanded, NodeFinished
from swarmx.workflows.limits import OUTPUT_CHARS
from swarmx.workflows.nodes import ImageNode, LlmNode, ToolNode, UseNode
from swarmx.workflows.spec import bind_inputs
from swarmx.workflows.state import NodeRun, Run, Scope
from swarmx.workflows.values import Json, checked, nearest
from swarmx.workflows.work import Start, StartModelCall, StartToolCall


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Record this event: it follows from the others."""

    event: Event


Command = Start | Record


def model_call(
    run_node: NodeRun, node: LlmNode | ImageNode, kind: CallKind, body: dict[str, Any], now_s: float
) -> StartModelCall:
    """The call of the node's model."""
    return StartModelCall(
        path=run_node.path,
        kind=kind,
        role=node.role,
        model=node.model,
        body=body,
        attempt=run_node.attempt,
        timeout_at_s=_timeout_at_s(run_node, node, now_s),
    )


def tool_call(
    run_node: NodeRun,
    node: ToolNode | UseNode,
    tool: str,
    arguments: dict[str, Json],
    tools: Mapping[str, ToolSpec],
    now_s: float,
) -> StartToolCall:
    """The call of a tool of this catalogue. Raises WorkflowError when it has none, or not for such arguments."""
    idempotent = run_node.idempotent
    if run_node.state != "running":  # what is out has been checked, whatever has become of the catalogue
        spec = tools.get(tool)
        if spec is None:
            known = ", ".join(sorted(tools)) or "none"
            raise WorkflowError(f"there is no tool {tool!r}{nearest(tool, set(tools))}; tools are {known}")
        problem = _problem(msgspec.json.encode(spec.parameters), arguments)
        if problem:
            raise WorkflowError(f"{tool} cannot be called with these arguments: {problem}")
        idempotent = spec.idempotent
    return StartToolCall(
        path=run_node.path,
        tool=tool,
        arguments=arguments,
        attempt=run_node.attempt,
        timeout_at_s=_timeout_at_s(run_node, node, now_s),
        idempotent=idempotent,
    )


def finish(path: str, output: Json) -> Record:
    """The node leaves this. Raises WorkflowError when it is too much, or not JSON."""
    return Record(event=NodeFinished(path=path, output=checked(output, limit=OUTPUT_CHARS)))


def check_count(run: Run, more: int) -> None:
    """Raises WorkflowError when the run may not have so many more nodes."""
    most = run.graph.spec.limits.nodes
    if len(run.nodes) + more > most:
        raise WorkflowError(
            f"the run would come to {len(run.nodes) + more} nodes, at most {most} may be expanded; "
            "lower max_items, max_iterations or max_steps"
        )


def check_room(run: Run, run_node: NodeRun, more: int) -> None:
    """Raises WorkflowError when the node may not open a body of so many nodes."""
    check_count(run, more)
    depth = run.graph.spec.limits.depth
    if run_node.scope.depth >= depth:
        raise WorkflowError(f"the run would open a body inside {depth} others, limits.depth allows no more")


def outputs_of(scope: Scope) -> dict[str, Json]:
    """What a whole workflow leaves. Raises WorkflowError."""
    declared = scope.body.outputs
    if not declared:
        return {scope.body.last: scope.outputs[scope.body.last]}
    outputs = {
        name: template.value(scope.context(template.names), where=f"outputs.{name}")
        for name, template in declared.items()
    }
    checked(outputs, limit=OUTPUT_CHARS)
    return outputs


def begin_workflow(run: Run, run_node: NodeRun, name: str, given: dict[str, Json]) -> Record:
    """Open a workflow of the definition inside the node. Raises WorkflowError for inputs that it does not take."""
    definition = run.graph.spec.workflows[name]
    inputs = bind_inputs(definition, given)
    check_room(run, run_node, len(definition.nodes))
    return Record(event=NodeExpanded(path=run_node.path, inputs=inputs))


def rendered(run_node: NodeRun, name: str) -> str:
    """The text that the node's template comes to."""
    template = run_node.step.templates[name]
    return template.text(run_node.scope.context(template.names), where=name)


def _timeout_at_s(run_node: NodeRun, node: LlmNode | ImageNode | ToolNode | UseNode, now_s: float) -> float | None:
    """What is out already, and is made again after a restart, keeps the time at which it is given up."""
    if run_node.state == "running" or node.timeout_s is None:
        return run_node.timeout_at_s
    return now_s + node.timeout_s


def _problem(schema: bytes, arguments: dict[str, Json]) -> str:
    checker = _checker(schema)
    return checker if isinstance(checker, str) else checker.problem(arguments)


@lru_cache(maxsize=512)
def _checker(schema: bytes) -> Arguments | str:
    try:
        return Arguments(msgspec.json.decode(schema))
    except ConfigError as error:
        return str(error)

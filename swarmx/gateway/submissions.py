"""What a client submits: a definition by itself, or one with its inputs."""

from __future__ import annotations

from typing import Any

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.workflows.nodes import WorkflowSpec
from swarmx.workflows.source import read_source
from swarmx.workflows.spec import parse_workflow


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    workflow: msgspec.Raw
    inputs: dict[str, Any] = {}


def submission(body: bytes) -> tuple[WorkflowSpec, dict[str, Any]]:
    """A definition by itself, or `{"workflow": definition or its YAML, "inputs": {...}}`. Raises WorkflowError.

    Of a JSON envelope only the definition is held to the size of a definition; its inputs may be larger.
    """
    try:
        envelope = msgspec.json.decode(body, type=_Envelope)
        text = bytes(envelope.workflow)
        return parse_workflow(msgspec.json.decode(text, type=str) if text.startswith(b'"') else text), envelope.inputs
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # not an envelope, or a bad one, which is told below
    data = read_source(body)
    if "workflow" not in data:
        return parse_workflow(data), {}
    inputs = data.get("inputs", {})
    unknown = sorted(set(data) - {"workflow", "inputs"})
    if unknown or not isinstance(inputs, dict):
        raise WorkflowError(
            f"a submission has the fields workflow and inputs (a mapping), not {', '.join(unknown) or 'inputs'}."
        )
    return parse_workflow(data["workflow"]), inputs

"""What a workflow has others do: calls of models and of tools, ready to be sent."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from swarmx.core.nouns import CallKind
from swarmx.core.toolbox import ToolSpec
from swarmx.workflows.events import NodeStarted
from swarmx.workflows.values import Json


class StartModelCall(msgspec.Struct, frozen=True, kw_only=True):
    """Record NodeStarted, then have this call answered. `body` is the OpenAI request, ready for the wire.

    What has not answered by `timeout_at_s` (Unix seconds) is given up.
    """

    path: str
    kind: CallKind
    role: str
    model: str
    body: dict[str, Any]
    attempt: int = 1
    timeout_at_s: float | None = None

    @property
    def started(self) -> NodeStarted:
        return NodeStarted(path=self.path, kind=self.kind, attempt=self.attempt, timeout_at_s=self.timeout_at_s)


class StartToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """Record NodeStarted, then have this tool called. The arguments have been checked against its parameters.

    What has not answered by `timeout_at_s` (Unix seconds) is given up. A tool that is not `idempotent` may not be
    called again when nobody knows whether it was.
    """

    path: str
    tool: str
    arguments: dict[str, Json]
    attempt: int = 1
    timeout_at_s: float | None = None
    idempotent: bool = True

    @property
    def started(self) -> NodeStarted:
        return NodeStarted(
            path=self.path,
            kind="tool",
            attempt=self.attempt,
            timeout_at_s=self.timeout_at_s,
            idempotent=self.idempotent,
        )


Start = StartModelCall | StartToolCall

NO_TOOLS: Mapping[str, ToolSpec] = MappingProxyType({})
"""A catalogue of tools where there are none."""

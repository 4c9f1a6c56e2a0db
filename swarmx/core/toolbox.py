"""Tools of workflows: what a provider offers, what it is asked to do, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

ToolCause = Literal["", "tool", "timeout", "limit", "refused", "unavailable"]
"""Why a call has no output: the tool said so, took too long, went over a limit, may not be called that way, or is not
there now. Only what timed out or was unavailable may go better the next time."""

RESULT_LIMIT_BYTES = 256 * 1024


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as it is offered. `parameters` is the JSON Schema of its arguments, an object.

    `pool` names the replicas that have it. One that is not `idempotent` is not called again after a crash. An empty
    `tenants` means everybody. The description may come from a stranger (an MCP server): show it to nobody but the
    model that chooses among the tools.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    pool: str
    timeout_s: float
    idempotent: bool
    tenants: tuple[str, ...] = ()
    result_limit_bytes: int = RESULT_LIMIT_BYTES


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One use of a tool. `key` is the same for every attempt at it, `request_id` is not.

    `deadline_at_s` is in seconds since 1970, so that another process understands it.
    """

    tool: str
    arguments: dict[str, Any]
    key: str
    request_id: str
    tenant: str
    deadline_at_s: float | None = None


class ToolResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a call: `output`, any JSON value, or an `error` and its `cause`.

    `cpu_s` is what the tool's processes computed, where they are known; `wall_s` does not count waiting for a slot.
    """

    output: Any = None
    error: str = ""
    cause: ToolCause = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica of tools has: `slots` calls at a time, its tools, and why others are not there, by provider."""

    pool: str
    slots: int
    tools: list[ToolSpec]
    refused: dict[str, str]


class ToolProvider(Protocol):
    """Offers tools and calls them.

    `open` raises ConfigError when its tools cannot be had, and says why; they are refused with that text then. `tools`
    is what is offered now, and may change while it is open. A tool's own failure is a result; `call` raises nothing
    but cancellation, and when cancelled has ended everything that it started before it returns. Arguments have been
    checked against `parameters` before. After `close` nothing of it is left running.
    """

    @property
    def name(self) -> str: ...
    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def tools(self) -> Sequence[ToolSpec]: ...
    async def call(self, call: ToolCall) -> ToolResult: ...

"""The Python client of the REST API: `Client` for ordinary code, `AsyncClient` for asyncio."""

from swarmx.sdk.client import AsyncClient
from swarmx.sdk.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    Outdated,
    Problem,
    ServerFailed,
    Unauthorized,
    Unavailable,
    Unprocessable,
    Unreachable,
    WorkflowEnded,
)
from swarmx.sdk.models import (
    Call,
    Explained,
    Node,
    Page,
    Why,
    Workflow,
    WorkflowEvent,
    WorkflowSummary,
)
from swarmx.sdk.sync import Client

__all__ = [
    "AsyncClient",
    "BadRequest",
    "Call",
    "Client",
    "Conflict",
    "Explained",
    "Forbidden",
    "Node",
    "NotFound",
    "Outdated",
    "Page",
    "Problem",
    "ServerFailed",
    "Unauthorized",
    "Unavailable",
    "Unprocessable",
    "Unreachable",
    "Why",
    "Workflow",
    "WorkflowEnded",
    "WorkflowEvent",
    "WorkflowSummary",
]

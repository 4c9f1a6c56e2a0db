"""What the routes work with; the composition root fills it in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from swarmx.core.messages import Message
from swarmx.core.ports import Store
from swarmx.gateway.keys import Keyring
from swarmx.gateway.telemetry import Telemetry
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.runtime.calls import CallService
from swarmx.runtime.clock import Clock
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.workflows import WorkflowRunner


@dataclass(slots=True, kw_only=True)
class Context:
    """One running SwarmX, seen from its front door.

    `policy` and `parameters` are those in force; `flush` returns once the records of all ended calls can be read.
    """

    clock: Clock
    store: Store
    keys: Keyring
    post: Callable[[Message], None]
    flush: Callable[[], Awaitable[None]]
    calls: CallService
    workflows: WorkflowRunner
    transparent: TransparentWorkflows
    book: FleetBook
    telemetry: Telemetry
    policy: str
    parameters: dict[str, float]

"""What the routes work with; the composition root fills it in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from swarmx.core.audit import Report
from swarmx.core.control import CoordinatorStatus, PolicyStatus
from swarmx.core.ports import ControlStore, Store
from swarmx.gateway.idempotency import Keys
from swarmx.gateway.keys import Keyring
from swarmx.gateway.recent import RecentDecisions
from swarmx.gateway.telemetry import Telemetry
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.memory.audit import AuditLog
from swarmx.neural.structure_live import Remaining
from swarmx.runtime.calls import CallService
from swarmx.runtime.changes import Changes
from swarmx.runtime.clock import Clock
from swarmx.runtime.console import Console
from swarmx.runtime.desk import Desk
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.forecast_book import ForecastBook
from swarmx.runtime.overview import Overview
from swarmx.runtime.tool_catalogue import ToolCatalogue
from swarmx.runtime.workflows import WorkflowRunner


@dataclass(slots=True, kw_only=True)
class Context:
    """One running SwarmX, seen from its front door.

    `flush` returns once the records of all ended calls can be read; `routing` tells the routing policy in force;
    `remaining` what a running workflow is still expected to do, None where nobody can say; `changes` tells who waits
    for news of a workflow.
    """

    clock: Clock
    store: Store
    keys: Keyring
    flush: Callable[[], Awaitable[None]]
    calls: CallService
    workflows: WorkflowRunner
    transparent: TransparentWorkflows
    book: FleetBook
    telemetry: Telemetry
    recent: RecentDecisions
    routing: Callable[[], PolicyStatus]
    overview: Overview
    desk: Desk
    console: Console
    coordinator: Callable[[], CoordinatorStatus]
    audit: AuditLog
    control: ControlStore
    check_audit: Callable[[], Awaitable[Report]]
    remaining: Callable[[str], Remaining | None]
    changes: Changes
    idempotency: Keys
    forecasts: ForecastBook
    tools: ToolCatalogue

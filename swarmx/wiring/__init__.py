"""The composition root: the only package that knows everyone, and puts a running SwarmX together."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
from fastapi import FastAPI

from swarmx.agents.router import RouterAgent
from swarmx.agents.scaler import TIMER, ScalerAgent
from swarmx.config import Settings
from swarmx.core.actions import Cancel, Deploy, Dispatch, Drain, Refuse
from swarmx.core.audit import Head, Report
from swarmx.core.control import PolicyStatus, Proposal
from swarmx.core.errors import ConfigError
from swarmx.core.messages import DecisionMade, Message, TimerFired
from swarmx.core.nouns import Call, Decision
from swarmx.core.ports import SchedulerAgent
from swarmx.core.prompts import PromptText
from swarmx.core.records import CallRecord
from swarmx.gateway.app import create_app
from swarmx.gateway.context import Context
from swarmx.gateway.idempotency import Keys
from swarmx.gateway.keys import Keyring
from swarmx.gateway.recent import RecentDecisions
from swarmx.gateway.telemetry import Telemetry
from swarmx.gateway.transparent import TransparentWorkflows
from swarmx.memory.audit import AuditLog, verify_files
from swarmx.runtime.calls import CallService
from swarmx.runtime.changes import Changes
from swarmx.runtime.clock import WallClock
from swarmx.runtime.figures import Figures
from swarmx.runtime.fleet import Fleet
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.journal import FileJournal, MemoryJournal
from swarmx.runtime.live import LiveShell
from swarmx.runtime.overview import Overview
from swarmx.runtime.retention import DAY_S, keep_for
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.upstream import Upstream
from swarmx.runtime.watch import Watch
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.wiring.adaptation import adaptation, remember
from swarmx.wiring.control import control_plane
from swarmx.wiring.curves import curves
from swarmx.wiring.fleet import elastic_providers, emulated_provider, fixed_providers, groups
from swarmx.wiring.forecast_book import forecast_book
from swarmx.wiring.predictors import forecasters, path_forecasts, refiner, workflow_forecasts
from swarmx.wiring.ray_fleet import ray_provider, take_over
from swarmx.wiring.records import Background
from swarmx.wiring.state import open_state
from swarmx.wiring.tasks import flushed, running_task
from swarmx.wiring.toolbox import tool_pools

log = logging.getLogger(__name__)

_SHOWN_PROPOSALS = 50
_OPEN_PROPOSALS = 200


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[tuple[FastAPI, Context]]:
    """Everything started, in order, and stopped again in the opposite order."""
    state_dir = settings.state.dir
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    async with AsyncExitStack() as stack:
        stack.callback(_lock(state_dir).close)
        clock = WallClock()
        state = await open_state(settings.state, stack, clock=clock.now_s)
        store, control = state.store, state.control
        keep_mb = settings.state.audit_keep_mb
        audit = AuditLog(
            state_dir / "audit.jsonl",
            clock=clock.now_s,
            on_head=_log_head,
            file_bytes=settings.state.audit_file_mb << 20,
            keep_bytes=None if keep_mb is None else keep_mb << 20,
        )
        await audit.open()
        stack.push_async_callback(audit.close)

        elastic = groups(settings)
        emulated = emulated_provider(settings)
        ray = ray_provider(
            settings, clock=clock, post=lambda message: post(message), on_lost=lambda replica_id: fleet.lost(replica_id)
        )
        on_ray = (lambda replica_id: None) if ray is None else ray.token_of
        tools = tool_pools(settings, state_dir / "logs", token_on_ray=on_ray)
        providers = elastic_providers(settings, emulated, tools, state_dir / "logs", ray)
        on_demand = {group.model: group.kind for group in elastic}
        book = FleetBook(clock, elastic=lambda replica_id: fleet.is_elastic(replica_id), models=on_demand)
        figures = Figures(models=on_demand)
        telemetry = Telemetry(book, faults=lambda: switchboard.faults)
        background = Background(telemetry)
        stack.push_async_callback(background.flush)
        await stack.enter_async_context(running_task(background.run(), name="records"))

        def post(message: Message) -> None:
            shell.post(message)

        metrics = telemetry.predictor
        found = await forecasters(settings.predictor, clock=clock, post=post, metrics=metrics)
        learning = adaptation(
            settings.predictor,
            found,
            stack,
            newest=store.newest_finished,
            folder=state_dir / "predictors",
            post=post,
        )
        await remember(settings.predictor, found, newest=store.newest_finished, folder=state_dir / "predictors")
        coming, reads = workflow_forecasts(settings.predictor)

        paths = path_forecasts(coming, settings.predictor, clock=clock, post=post, metrics=metrics)

        def prompt_read(call: Call, prompt: PromptText) -> None:
            if reads:
                coming.prompt_read(call.workflow_id, prompt.text)
            gap = coming.tools_returned(call, returns_tools=prompt.returns_tools, now_s=clock.now_s())
            if gap is not None:
                transparent.tools_returned(call.workflow_id, gap.tools, gap.gap_s)

        def answer_read(call: Call, tools: tuple[str, ...]) -> None:
            coming.answer_read(call, tools, clock.now_s())
            transparent.answered(call, tools)

        router = RouterAgent(settings.router.settings(sorted(on_demand), settings.tenants))
        scaler = ScalerAgent(settings.scaler.settings(elastic, await control.startups()))
        agents: Sequence[SchedulerAgent] = (router, scaler, *learning.agents)
        switchboard = Switchboard(agents, epoch=int(clock.now_s()), journal=await _journal(settings, agents, stack))
        upstream = Upstream()
        stack.push_async_callback(upstream.close)

        def record_call(record: CallRecord) -> None:
            telemetry.call_ended(record)
            figures.call_ended(record)

        def keep_call(record: CallRecord) -> None:
            background.add(store.record_call(record))

        def log_decision(message: Message, now_s: float) -> None:
            if isinstance(message, DecisionMade):
                background.add(store.record_decision(message.decision))

        async def decisions(call_id: str) -> Sequence[Decision]:
            await background.flush()
            return await store.decisions(call_id, tenant=None)

        async def proposals() -> Sequence[Proposal]:
            """The last ones, and all that wait, however old: there may be many newer ones."""
            waiting = await control.proposals(states=("open",), limit=_OPEN_PROPOSALS)
            newest = await control.proposals(states=None, limit=_SHOWN_PROPOSALS)
            return list({proposal.proposal_id: proposal for proposal in (*waiting, *newest)}.values())

        def routing() -> PolicyStatus:
            return PolicyStatus(policy=router.policy.name, parameters=router.objective.parameters)

        def workflow_took(seconds: float) -> None:
            figures.workflow_ended(seconds, clock.now_s())

        def replica_started(group_id: str, seconds: float) -> None:
            group = next(group for group in elastic if group.group_id == group_id)
            if group.provider != "emulated":  # these take what the settings say, at this life's time scale
                background.add(control.record_startup(group_id, group.device, seconds, clock.now_s()))

        calls = CallService(
            post=post,
            clock=clock,
            forecaster=found.first,
            upstream=upstream,
            book=book,
            on_record=record_call,
            keep=keep_call,
            refiner=await refiner(
                found,
                settings.predictor,
                stack,
                clock=clock,
                post=post,
                metrics=metrics,
                on_refined=lambda *refined: calls.refined(*refined),
            ),
            path_of=paths.of if reads and settings.predictor.paths else None,
            on_prompt=prompt_read,
            on_answer=answer_read,
            token_of=tools.token_of,
        )
        watch = Watch(
            post,
            clock,
            every_s=settings.watch.every_s,
            timeout_s=settings.watch.timeout_s,
            failures=settings.watch.failures,
            state_when_up=lambda replica_id: fleet.state_when_up(replica_id),
        )
        stack.push_async_callback(watch.close)
        fleet = Fleet(
            providers=providers,
            groups=elastic,
            watch=watch,
            post=post,
            clock=clock,
            audit=audit,
            in_flight=router.in_flight,
            on_started=replica_started,
        )
        shell = LiveShell(
            switchboard,
            clock,
            {
                Dispatch: calls.perform_dispatch,
                Cancel: calls.perform_cancel,
                Refuse: calls.perform_refuse,
                Deploy: fleet.perform_deploy,
                Drain: fleet.perform_drain,
                **learning.performers,
            },
        )
        stack.callback(shell.close)
        recent = RecentDecisions()
        forecasts = forecast_book(settings.predictor, found)
        switchboard.observers += [
            book.observe,
            calls.observe,
            fleet.observe,
            figures.observe,
            coming.hear,
            tools.catalogue.observe,
            telemetry.observe,
            recent.observe,
            forecasts.observe,
            log_decision,
        ]
        published = await curves(
            settings.predictor, stack, clock=clock, post=post, is_beside=lambda name: on_ray(name) is not None
        )
        if published is not None:
            switchboard.observers.append(published.observe)
        await stack.enter_async_context(running_task(tools.catalogue.run(), name="tools"))
        fixed_ones = fixed_providers(settings, emulated, tools)
        for provider in (*providers.values(), *fixed_ones):
            stack.push_async_callback(provider.stop)
        stack.push_async_callback(fleet.close)  # first: it calls off the starts that are going on
        if ray is not None:
            await take_over(ray, fleet, elastic)
        for fixed in fixed_ones:
            for replica in await fixed.start():
                watch.add(replica)

        changes = Changes()
        workflows = WorkflowRunner(
            store,
            calls,
            clock,
            changes.notify,
            post=post,
            on_latency=workflow_took,
            exclusive=state.exclusive,
            lease_s=settings.state.lease_s,
            tools=tools.catalogue,
            prices={model: entry.price() for model, entry in settings.prices.items()},
        )
        stack.push_async_callback(workflows.close)
        state.listen(workflows.posted)
        transparent = TransparentWorkflows(
            store,
            clock,
            epoch=workflows.epoch,
            idle_s=settings.workflows.transparent_idle_s,
            others_every_s=None if state.exclusive else settings.state.lease_s / 3.0,
            traces=settings.workflows.traces,
            post=post,
            on_latency=workflow_took,
        )
        await transparent.recover()
        await stack.enter_async_context(running_task(transparent.run(), name="transparent workflows"))

        overview = Overview(
            clock=clock,
            book=book,
            figures=figures,
            routing=routing,
            scaling=lambda: PolicyStatus(policy=scaler.policy.name, parameters=scaler.parameters),
            bounds=scaler.bounds,
            startup_s=scaler.startup_s,
            next_cost=scaler.next_cost,
            last_plan=scaler.last_plan,
            proposals=proposals,
            decisions=decisions,
            workflows_running=lambda: workflows.running,
        )

        checking = asyncio.Lock()

        async def check_audit() -> Report:
            async with checking:  # it reads the whole log: one at a time is enough work
                return await asyncio.to_thread(verify_files, state_dir)

        plane = await control_plane(
            settings,
            stack,
            clock=clock,
            control=control,
            audit=audit,
            overview=overview,
            fleet=fleet,
            telemetry=telemetry,
            check_audit=check_audit,
            post=post,
            observers=switchboard.observers,
        )
        found.announce(post, metrics)
        if elastic:
            shell.post(TimerFired(key=TIMER), to=scaler.name)
        await workflows.recover()
        if settings.state.keep_days is not None:
            forgetting = keep_for(store, settings.state.keep_days * DAY_S)
            await stack.enter_async_context(running_task(forgetting, name="retention"))

        context = Context(
            clock=clock,
            store=store,
            keys=Keyring(state_dir / "keys.json"),
            flush=background.flush,
            calls=calls,
            workflows=workflows,
            transparent=transparent,
            book=book,
            telemetry=telemetry,
            recent=recent,
            routing=routing,
            overview=overview,
            desk=plane.desk,
            console=plane.console,
            coordinator=plane.status,
            audit=audit,
            control=control,
            check_audit=check_audit,
            forecasts=forecasts,
            remaining=lambda workflow_id: coming.remaining(workflow_id, clock.now_s()),
            changes=changes,
            idempotency=Keys(store, clock),
            tools=tools.catalogue,
        )
        yield create_app(context, max_body_bytes=settings.server.max_body_bytes), context


def _log_head(head: Head) -> None:
    """The log of the server is a second place for heads, for whoever ships it elsewhere."""
    log.info("audit head %d %s", head.seq, head.hash)


def _lock(folder: Path) -> IO[bytes]:
    """One server a state folder: two would both run the workflows in it. Raises ConfigError."""
    file = os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"another SwarmX runs on {folder}; stop it, or choose a folder with --state-dir.") from None
    return file


async def _journal(settings: Settings, agents: Sequence[Any], stack: AsyncExitStack) -> FileJournal | MemoryJournal:
    if not settings.state.journal:
        return MemoryJournal(limit=0)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000_000:09d}"
    path = settings.state.dir / "journals" / f"{stamp}.jsonl"
    journal = FileJournal(
        path,
        {agent.name: msgspec.to_builtins(agent.settings) for agent in agents},
        file_bytes=settings.state.journal_file_mb << 20,
        keep_bytes=settings.state.journal_keep_mb << 20,
    )
    await stack.enter_async_context(flushed(journal))
    return journal

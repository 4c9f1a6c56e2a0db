"""Puts a desk into a Serve process: its clock, log and forecaster, and the line to the board of signals."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from swarmx.agents.router import RouterAgent
from swarmx.compat.ray_serve.decision_log import DecisionLog, log_path
from swarmx.compat.ray_serve.desk import Desk
from swarmx.compat.ray_serve.forecasts import forecasters
from swarmx.compat.ray_serve.options import RouterOptions
from swarmx.compat.ray_serve.signals import ReplicaSignal, RouterReport, packed, signal_in
from swarmx.compat.ray_serve.ticket import Seen
from swarmx.core.messages import DemandReported
from swarmx.runtime.clock import WallClock
from swarmx.runtime.garbage import leave_what_is_here_too
from swarmx.runtime.journal import FileJournal

log = logging.getLogger(__name__)

Stats = tuple[str, int, dict[str, Any]]
_AGAIN_S = 2.0
_FLUSH_S = 1.0
_NEWS_APART_S = 0.05  # what replicas push meanwhile comes at once
_BESIDE: set[asyncio.Future[None]] = set()


def open_desk(deployment_id: Any, options: RouterOptions) -> Desk:
    """A desk on the running loop, for as long as the process: Serve does not tell when a router is no longer used."""
    import ray

    name = f"{deployment_id.app_name}/{deployment_id.name}" if deployment_id.app_name else str(deployment_id.name)
    clock = WallClock()
    process = _process()
    decisions, journal = _records(name, process, options)
    board: list[Any] = []

    def report(demand: DemandReported) -> None:
        if board and ray.is_initialized():
            told = RouterReport(deployment=name, router=process, at_s=clock.now_s(), demand=demand)
            board[0].report.remote(packed(told))

    desk = Desk(
        name,
        options,
        clock=clock,
        forecasters=lambda post: forecasters(options, clock=clock, post=post),
        decisions=decisions,
        journal=journal,
        on_report=report,
    )
    if journal is not None:
        _keep(_flush(journal))
    if options.push:
        _keep(_listen(desk, board))
    leave_what_is_here_too()
    return desk


def tell_replicas(desk: Desk, seen: Sequence[Stats]) -> None:
    """Which replicas there are; what Serve's own polling brought of them stands in for what was not pushed."""
    desk.replicas([Seen(replica_id=replica_id, max_ongoing=most) for replica_id, most, _ in seen])
    for replica_id, _, stats in seen:
        if isinstance(running := stats.get("running"), int | float):
            desk.heard(
                ReplicaSignal(
                    deployment=desk.deployment,
                    replica_id=replica_id,
                    at_s=float(stats.get("t", 0.0)),
                    running=int(running),
                    waiting=int(stats.get("waiting", 0)),
                    kv_usage=float(stats.get("kv_usage", 0.0)),
                )
            )


def _keep(coroutine: Coroutine[Any, Any, None]) -> None:
    """Let it run: the loop alone would not hold on to it."""
    task = asyncio.ensure_future(coroutine)
    _BESIDE.add(task)
    task.add_done_callback(_BESIDE.discard)


async def _flush(journal: FileJournal) -> None:
    while True:
        await asyncio.sleep(_FLUSH_S)
        journal.flush()


async def _listen(desk: Desk, board: list[Any]) -> None:
    """Hear what replicas push, for as long as Ray runs here; a board that is lost is looked for again."""
    import ray

    from swarmx.compat.ray_serve.board import find_board

    after = 0
    while ray.is_initialized():  # once it is shut down, a call to it ends the process, or starts another Ray
        try:
            found = await asyncio.to_thread(find_board)
            board[:] = [found]
            while True:
                after, news = await found.news.remote(desk.deployment, after)
                for data in news:
                    desk.heard(signal_in(data))
                await asyncio.sleep(_NEWS_APART_S)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # signals are a help: routing goes on by own counts
            board.clear()
            after = 0
            log.info("no signals of %s for now: %r", desk.deployment, error)
            await asyncio.sleep(_AGAIN_S)


def _records(name: str, process: str, options: RouterOptions) -> tuple[DecisionLog | None, FileJournal | None]:
    path = log_path(options.log_dir, name, process) if options.log_dir else None
    if path is None and not options.log_url:
        return None, None
    token = os.environ.get(options.log_token_env, "")
    decisions = DecisionLog(path=path, url=options.log_url, token=token)
    if path is None or not options.journal:
        return decisions, None
    config = {RouterAgent.name: msgspec.to_builtins(Desk.settings(name, options))}
    return decisions, FileJournal(path.with_suffix("").with_suffix(".journal.jsonl"), config)


def _process() -> str:
    import ray

    context = ray.get_runtime_context()
    return f"{context.get_node_id()[:8]}-{context.get_actor_id() or 'driver'}-{os.getpid()}"

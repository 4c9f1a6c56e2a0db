"""Runs jobs: sends each to the server that the scheduler picks, and to another one when it is lost there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, assert_never

import msgspec

from swarmx.compat.comfyui.attempt import Attempt, Done, LossReason, Lost, Run
from swarmx.compat.comfyui.files import Files, tagged
from swarmx.compat.comfyui.graph import above
from swarmx.compat.comfyui.hearing import Hearing
from swarmx.compat.comfyui.history import files_of, given_up, outcome_of, refused_by_server, shown, succeeded
from swarmx.compat.comfyui.jobs import Ended, Job, Outcome
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.parts import Parts
from swarmx.compat.comfyui.relay import Relay
from swarmx.compat.comfyui.scheduling import Placement, Scheduler, Waiting
from swarmx.compat.comfyui.server import FileAway, ServerAway
from swarmx.compat.comfyui.servers import Servers
from swarmx.compat.comfyui.settings import FrontSettings
from swarmx.compat.comfyui.store import JobStore, StoredJob
from swarmx.core.errors import StoreError

log = logging.getLogger(__name__)

_TICK_S = 1.0
_VERDICT_S = 10.0


class JobRunner:
    """The jobs that have not ended, and those that run. Everything happens on one event loop."""

    def __init__(
        self,
        *,
        settings: FrontSettings,
        store: JobStore,
        scheduler: Scheduler,
        servers: Servers,
        book: NodeBook,
        files: Files,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._store = store
        self._scheduler = scheduler
        self._servers = servers
        self._book = book
        self._files = files
        self._clock = clock
        self._runs: dict[str, Run] = {}  # by server
        self._server_of: dict[str, str] = {}  # by prompt id
        self._awaited: set[str] = set()  # servers of whose files there are jobs that wait
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._parts = Parts(
            settings=settings,
            store=store,
            scheduler=scheduler,
            book=book,
            files=files,
            runs=self,
            folder=store.latents,
            clock=clock,
        )
        self.relay: Relay
        hearing = Hearing(runs=self._runs, files=files, parts=self._parts, relay=lambda: self.relay)
        servers.on_event, servers.on_binary = hearing.event, hearing.binary
        servers.on_change = self._servers_changed

    # What others see

    def running(self, tenant: str | None = None) -> list[Job]:
        """The jobs that run, first begun first."""
        whole = [(run.started_s, run.job) for run in self._runs.values() if run.job.part is None]
        found = sorted([*whole, *self._parts.running(tenant)], key=lambda pair: pair[0])
        return [job for _, job in found if tenant in (None, job.tenant)]

    def open_count(self, tenant: str | None = None) -> int:
        """Jobs that have not ended."""
        waiting = len(self._scheduler) if tenant is None else self._scheduler.waits(tenant)
        return waiting - self._parts.waiting(tenant) + len(self.running(tenant))

    def current(self, tenant: str, client_id: str) -> dict[str, Any] | None:
        """The node at which a running job of the client is."""
        for run in self._runs.values():
            if (run.job.tenant, run.job.client_id) == (tenant, client_id) and run.attempt.node is not None:
                return run.attempt.node | {"prompt_id": run.job.shown_id}
        return None

    # From outside

    async def accept(self, job: Job, able: frozenset[str], *, doubtful: bool) -> dict[str, Any] | None:
        """Take a job on; returns once it is stored. With `doubtful`, and a server that is free at once, that server's
        word is waited for: its body where it refuses the graph, which is then forgotten, or without an `error` where it
        refuses some of its outputs; None otherwise.
        """
        self._scheduler.add(Waiting(job=job, able=able, since_s=job.created_s))
        self._kick()
        self.relay.queue_changed()
        server = self._server_of.get(job.prompt_id)
        if not doubtful or server is None:
            return None
        run = self._runs[server]
        run.awaited = True
        try:
            async with asyncio.timeout(_VERDICT_S):
                return await asyncio.shield(run.verdict)
        except TimeoutError:
            run.awaited = False
            return None

    async def recover(self, stored: Iterable[StoredJob]) -> None:
        """Go on with what an earlier life of the front left: jobs that ran are looked for at their servers."""
        for row in stored:
            job = row.job
            if row.state == "in_progress" and row.server is None and (parts := await self._store.parts(job.prompt_id)):
                await self.recover(await self._parts.recover(row, parts))
                continue
            waiting = Waiting(job=job, able=self._able(job), since_s=job.created_s, attempt=row.attempts)
            if row.state == "in_progress" and row.server in self._servers.names and row.server not in self._runs:
                started_s = self._clock() if row.started_s is None else row.started_s
                self._start(waiting, str(row.server), None, started_s)
            else:
                self._scheduler.add(waiting)
        self._kick()

    async def cancel(self, prompt_ids: Iterable[str], *, tenant: str | None, running: bool = True) -> list[str]:
        """End these jobs of the tenant, as far as they have not ended; those that run only with `running`.

        Gives the ids of those that end by it: at once where they wait, and once their servers have stopped else.
        """
        stopped: list[str] = []
        waited: list[Job] = []
        for prompt_id in dict.fromkeys(prompt_ids):
            if running and (parts := self._parts.cancelled(prompt_id, tenant)):
                await self.cancel(parts, tenant=tenant)
                stopped.append(prompt_id)
            server = self._server_of.get(prompt_id)
            if server is not None and running and tenant in (None, self._runs[server].job.tenant):
                self._runs[server].cancelled = True
                self.spawn(self._interrupt(self._runs[server], server))
                stopped.append(prompt_id)
            job = self._scheduler.find(prompt_id)
            if job is not None and tenant in (None, job.tenant):
                self._scheduler.remove(prompt_id)
                waited.append(job)
        ids = [job.prompt_id for job in waited]
        if waited:
            await self.kept(lambda: self._store.cancelled(ids, self._clock()))
            self.relay.queue_changed()
        for job in waited:
            await self._parts.ended(job, Outcome(state="cancelled"))
        return stopped + ids

    async def run(self) -> None:
        """Look again from time to time: a policy that waits for a server may change its mind."""
        self._parts.sweep()
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._kick()
            except Exception:
                log.exception("no job could be placed")

    async def close(self) -> None:
        """Leave the jobs to the next life: those that run go on at their servers."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Placing

    def _able(self, job: Job) -> frozenset[str]:
        return self._book.able(job.graph, job.needed, job.files)

    def _servers_changed(self, server: str, *, told: bool) -> None:
        self._scheduler.server(server, up=self._servers.is_up(server))
        if told or (server in self._awaited and self._servers.is_up(server)):
            self._awaited.discard(server)
            self._scheduler.able_again(lambda waiting: self._able(waiting.job))
        if (run := self._runs.get(server)) is not None:
            run.attempt.stir()
        self._kick()

    def _kick(self) -> None:
        if self._closing:
            return
        now_s = self._clock()
        while (placement := self._scheduler.next(now_s)) is not None:
            if not self._parts.divide(placement, now_s):
                self.begin(placement)

    def begin(self, placement: Placement) -> None:
        """Run the job there, now."""
        self._start(placement.waiting, placement.server, placement, self._clock())

    def line_up(self, job: Job) -> None:
        """Run it where and when the scheduler says."""
        self._scheduler.add(Waiting(job=job, able=self._able(job), since_s=job.created_s))
        self._kick()

    def _start(self, waiting: Waiting, server: str, placement: Placement | None, started_s: float) -> None:
        """Run the job there; without a placement it is there already."""
        self._scheduler.server(server, up=self._servers.is_up(server))
        state = self._scheduler.states[server]
        forecast = placement.forecast if placement else self._scheduler.forecast(waiting.facts, state)
        self._scheduler.started(server, waiting, forecast, started_s)
        attempt = Attempt(waiting.job.prompt_id, self._servers[server], self._settings, self._clock)
        run = self._runs[server] = Run(waiting, attempt, started_s)
        run.placement = placement
        self._server_of[waiting.job.prompt_id] = server
        self.spawn(self._go(run, server))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do it beside other things."""
        task = asyncio.get_running_loop().create_task(work, name="comfyui job")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # One run

    async def _go(self, run: Run, server: str) -> None:
        job = run.job
        try:
            if run.placement is not None:
                run.waiting.attempt += 1
                decision = run.placement.decision
                await self._parts.written(job)
                await self.kept(lambda: self._store.started(job.prompt_id, server, run.started_s, decision))
                outcome = await self._submit(run, server)
            else:
                outcome = await run.attempt.follow()
            match outcome:
                case Done():
                    await self._done(run, server, outcome.entry)
                case Lost():
                    await self._lost(run, server, outcome)
                case dict():
                    await self._refused(run, server, outcome)
                case _:
                    assert_never(outcome)
        except Exception:
            log.exception("the job %s could not be followed at %s", job.prompt_id, server)
            if self._runs.get(server) is run:  # else the server may have the next job by now
                await self._lost(run, server, Lost(reason="forgotten", detail="an error of the front", may_run=True))
        finally:
            if not run.verdict.done():
                run.verdict.set_result(None)

    async def _submit(self, run: Run, server: str) -> Done | Lost | dict[str, Any]:
        job, comfy = run.job, self._servers[server]
        try:
            graph = await self._parts.localised(job, await self._files.localised(job, comfy), comfy)
        except FileAway as away:
            reason: LossReason = "gone" if away.gone else "files"
            return Lost(reason=reason, detail=str(away), may_run=False, begun=not away.refused, owner=away.owner)
        except ServerAway as away:
            return Lost(reason="files", detail=str(away), may_run=False, begun=not away.refused)
        if run.cancelled:
            return Lost(reason="cancelled", detail="it was cancelled before the server had it", may_run=False)
        client_id = self._servers.client_id(server)
        if job.part is None:  # no node goes there that was not judged
            graph = above(graph, job.outputs)
        try:
            status, body = await comfy.submit(
                job.prompt_id, graph, client_id=client_id, extra=job.extra, targets=job.outputs
            )
        except ServerAway as away:  # it may have taken the job and lost its answer
            log.warning("%s did not answer a job: %s", server, away)
            if away.refused:
                return Lost(reason="refused", detail=str(away), may_run=False, begun=False)
            return await run.attempt.follow()
        partly = bool(body.get("node_errors"))  # it runs what is left of the outputs
        if status == 400 or (partly and not run.awaited):
            return body
        if not run.verdict.done():
            run.verdict.set_result(body if partly else None)
        if run.cancelled:  # meanwhile: the server did not know the job when it was told to stop it
            self.spawn(self._interrupt(run, server))
        return await run.attempt.follow()

    async def _done(self, run: Run, server: str, entry: dict[str, Any]) -> None:
        job, now_s = run.job, self._clock()
        success = succeeded(entry)
        outputs = tagged(server, entry.get("outputs") or {})
        if success and not await self._parts.has_made(job, outputs):
            await self._lost(run, server, Lost(reason="files", detail="its latent cannot be had", may_run=False))
            return
        facts: dict[str, Any] = {
            "server": server,
            "attempts": run.waiting.attempt,
            "queue_s": round(run.started_s - job.created_s, 4),
            "run_s": round(now_s - run.started_s, 4),
        }
        if run.placement is not None:
            forecast = run.placement.forecast
            facts |= {"forecast_p50_s": forecast.quantile(0.5), "forecast_p95_s": forecast.quantile(0.95)}
        self._leave(run, server, seconds=now_s - run.started_s if success else None)
        await self.finish(job, outcome_of(entry, outputs, facts, run.held, cancelled=run.cancelled))

    async def _lost(self, run: Run, server: str, lost: Lost) -> None:
        """Run it elsewhere, unless that was tried often enough, or nobody wants it any more."""
        job, waiting = run.job, run.waiting
        log.warning("the job %s is lost at %s (%s): %s", job.prompt_id, server, lost.reason, lost.detail)
        if lost.may_run:
            self._servers.abandon(server, job.prompt_id)
        self._leave(run, server, seconds=None, lost=lost.reason != "cancelled" and lost.owner is None)
        if lost.owner is not None and lost.reason != "gone":
            self._servers.doubt(lost.owner)
        if not lost.begun:
            waiting.attempt -= 1
        if run.cancelled:
            await self.finish(job, Outcome(state="cancelled"))
        elif lost.reason == "gone":
            await self.finish(job, given_up(job, "FileGone", f"it loads a file that is gone: {lost.detail}"))
        elif waiting.attempt >= self._settings.attempts:
            detail = f"it was lost {waiting.attempt} times, last at {server}: {lost.detail}"
            await self.finish(job, given_up(job, "ServerLost", detail))
        elif lost.owner is not None and not lost.begun:
            await self._again(waiting, once_up=lost.owner)
        else:
            waiting.tried |= {server}
            await self._again(waiting)

    async def _refused(self, run: Run, server: str, body: dict[str, Any]) -> None:
        """The server does not take the graph, or some of its outputs: a client that still waits hears so, else others
        are tried, and all once more where the graph has files, of which the servers may have lost their copies."""
        job, waiting = run.job, run.waiting
        self._leave(run, server, seconds=None)
        self._files.restarted(server)
        if body.get("error") is None:  # it is at the outputs that it takes
            self._servers.abandon(server, job.prompt_id)
            self._servers.doubt(server)
        self._servers.ask_again(server)
        if run.awaited and not run.verdict.done():
            run.verdict.set_result(body)
            await self.kept(lambda: self._store.forget(job.prompt_id))
            self.relay.queue_changed()
            return
        once_more = bool(job.files) and server not in waiting.tried
        waiting.tried |= {server}
        if run.cancelled:
            await self.finish(job, Outcome(state="cancelled"))
        elif once_more or waiting.able - waiting.tried:
            await self._again(waiting)
        else:
            await self.finish(job, refused_by_server(job, body))

    async def _again(self, waiting: Waiting, *, once_up: str | None = None) -> None:
        """Let it wait for a server; with `once_up` for none before that one, whose file it loads, is up."""
        waiting.able = self._able(waiting.job) if once_up is None else frozenset()
        if once_up is not None:
            self._awaited.add(once_up)
        self._scheduler.add(waiting)  # before anything is waited for, so that it can be cancelled at any time
        with contextlib.suppress(StoreError):  # then a next life of the front looks for it at that server first
            await self._store.back(waiting.job.prompt_id, attempts=waiting.attempt)
        self._kick()
        self.relay.queue_changed()

    async def _interrupt(self, run: Run, server: str) -> None:
        """Have the server stop the job, once it listens. What is asked while it is told makes one more time."""
        run.stops += 1
        if run.stops > 1:
            return
        while run.stops and self._runs.get(server) is run:
            asked = run.stops
            try:
                await run.attempt.server.stop(run.job.prompt_id)
                run.stops -= asked
            except ServerAway as away:
                log.warning("%s could not be told to stop a job: %s", server, away)
                await asyncio.sleep(self._settings.poll_s)
        run.attempt.stir()

    def _leave(self, run: Run, server: str, *, seconds: float | None, lost: bool = False) -> None:
        """The server is free for the next job. What is awaited after this may find that job there."""
        self._runs.pop(server, None)
        self._server_of.pop(run.job.prompt_id, None)
        self._scheduler.ended(server, seconds=seconds, nodes=run.attempt.node_seconds(whole=seconds is not None))
        if lost:
            self._scheduler.states[server].forget()
            self._files.restarted(server)
            self._servers.doubt(server)

    async def finish(self, job: Job, outcome: Outcome) -> None:
        """Store the end of a job, then tell its client; that of a part goes into the end of its job."""
        self._kick()  # the next job need not wait for the disk
        history = shown(job, outcome) if job.part is None else msgspec.json.encode(outcome)
        end = Ended(state=outcome.state, ended_s=self._clock(), history=history)
        made, found = files_of(outcome)
        await self.kept(lambda: self._store.ended(job.prompt_id, end, made, found))
        self._files.stored([*made, *found])
        if job.part is not None:
            await self._parts.ended(job, outcome)
            return
        for kind, data in outcome.told:
            self.relay.send(job.tenant, job.client_id, kind, data)
        self.relay.send(job.tenant, job.client_id, "executing", {"node": None, "prompt_id": job.prompt_id})
        self.relay.queue_changed()

    async def kept(self, write: Callable[[], Awaitable[Any]]) -> None:
        """Until the store has it: a disk that is full for a while loses no job."""
        while True:
            try:
                await write()
                return
            except StoreError as problem:
                log.error("a job could not be written, which is tried again: %s", problem)
                await asyncio.sleep(_TICK_S)

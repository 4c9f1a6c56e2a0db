"""ComfyUI's routes for jobs: `/prompt`, `/queue`, `/history`, `/interrupt`, and its newer jobs API."""

from __future__ import annotations

import math
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from swarmx.compat.comfyui.answers import answer, read_json, refusal, whole_number
from swarmx.compat.comfyui.auth import require
from swarmx.compat.comfyui.files import Files
from swarmx.compat.comfyui.jobs import ENDED, Job, State, is_canonical
from swarmx.compat.comfyui.jobs_api import brief, detailed, page_of
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.quotas import Quotas
from swarmx.compat.comfyui.runner import JobRunner
from swarmx.compat.comfyui.scheduling import Scheduler
from swarmx.compat.comfyui.settings import FrontSettings
from swarmx.compat.comfyui.store import JobLine, JobStore, StoredJob
from swarmx.compat.comfyui.trail import Trail
from swarmx.compat.comfyui.validation import Accepted, Rejected, error, validate
from swarmx.gateway.keys import Key

_PAGE = 10_000
_HIGHEST = sys.float_info.max
_TOLD = 100  # ids that one note of the audit log names


class JobRoutes:
    """What clients do with jobs. Each sees its tenant's only, unless its key may read all."""

    def __init__(
        self,
        *,
        settings: FrontSettings,
        store: JobStore,
        scheduler: Scheduler,
        runner: JobRunner,
        book: NodeBook,
        files: Files,
        quotas: Quotas,
        trail: Trail,
        clock: Callable[[], float],
        seq: int,
    ) -> None:
        self._settings = settings
        self._store = store
        self._scheduler = scheduler
        self._runner = runner
        self._book = book
        self._files = files
        self._quotas = quotas
        self._trail = trail
        self._clock = clock
        self._seq = seq
        self._accepting: Counter[str] = Counter()  # jobs on their way into the store, by tenant
        self._accepting_bytes: Counter[str] = Counter()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/prompt", self.remaining),
            web.post("/prompt", self.submit),
            web.get("/queue", self.queue),
            web.post("/queue", self.change_queue),
            web.post("/interrupt", self.interrupt),
            web.get("/history", self.history),
            web.post("/history", self.change_history),
            web.get("/history/{prompt_id}", self.one_history),
            web.get("/jobs", self.jobs),
            web.post("/jobs/cancel", self.cancel_many),
            web.get("/jobs/{prompt_id}", self.job),
            web.post("/jobs/{prompt_id}/cancel", self.cancel),
        ]

    def status(self, tenant: str | None) -> dict[str, Any]:
        """How long the queue is, as clients are told it."""
        return {"exec_info": {"queue_remaining": self._runner.open_count(tenant)}}

    async def remaining(self, request: web.Request) -> web.Response:
        return answer(self.status(require(request, "read").sees))

    async def submit(self, request: web.Request) -> web.Response:
        """Validate, store, queue: in this order, and the answer comes after all three."""
        key = require(request, "submit")
        body = await read_json(request, self._settings.max_prompt_bytes)
        if not isinstance(body, dict) or "prompt" not in body:
            return refusal(400, error("no_prompt", "the request has no prompt", 'send {"prompt": GRAPH}'))
        wrong = self._envelope(body)
        if wrong is not None:
            return refusal(400, wrong)
        verdict = validate(
            body["prompt"],
            self._book.specs,
            targets=body.get("partial_execution_targets"),
            uploads=self._files.names(key.tenant),
        )
        if not self._book.servers:
            problem = error("no_server", "no server can be asked now", "none has told yet what it can run")
            return refusal(503, problem, {"Retry-After": "5"})
        if isinstance(verdict, Rejected):
            return answer(verdict.body, status=400)
        job = self._job(key, body, verdict)
        able = self._book.able(job.graph, job.needed, job.files)
        if not able:
            return refusal(400, self._nobody(job))
        if not await self._may_load(key, job):
            return refusal(400, error("invalid_prompt", "the graph loads a file that is not its client's"))
        filled = await self._quotas.outputs_full(key.tenant)
        if filled is not None:
            return refusal(429, filled, {"Retry-After": "3600"})
        full = self._full(key)
        if full is not None:
            return full
        self._accepting[key.tenant] += 1
        self._accepting_bytes[key.tenant] += job.size_bytes
        try:
            known = await self._store.accept(job)
        finally:
            self._accepting[key.tenant] -= 1
            self._accepting_bytes[key.tenant] -= job.size_bytes
        if known is not None:
            return self._again(key, job, known)
        refused = await self._runner.accept(job, able, doubtful=verdict.doubtful) or {}
        node_errors = refused.get("node_errors") or {}
        if refused.get("error") is not None:
            return answer({"error": refused["error"], "node_errors": node_errors}, status=400)
        node_errors = verdict.node_errors | node_errors
        return answer({"prompt_id": job.prompt_id, "number": job.number, "node_errors": node_errors})

    def _envelope(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """What is wrong with a request but for its graph."""
        prompt_id, number = body.get("prompt_id"), body.get("number", 0)
        if prompt_id is not None and not is_canonical(prompt_id):
            details = f"got {str(prompt_id)[:100]!r}"
            return error("invalid_prompt_id", "prompt_id is a UUID in its canonical form, in lower case", details)
        if not isinstance(number, int | float):
            return error("invalid_prompt", "number is a number", f"got {type(number).__name__}")
        if not abs(number) <= _HIGHEST:  # NaN is not, either
            return error("invalid_prompt", "number is a finite number", f"it may be up to {_HIGHEST:.1e}")
        for name, kind in (("extra_data", dict), ("client_id", str)):
            if body.get(name) is not None and not isinstance(body[name], kind):
                return error("invalid_prompt", f"{name} has another type than it should", type(body[name]).__name__)
        return None

    def _job(self, key: Key, body: dict[str, Any], verdict: Accepted) -> Job:
        self._seq += 1
        extra = dict(body.get("extra_data") or {})
        if body.get("client_id") is not None:
            extra["client_id"] = body["client_id"]
        client_id = extra["client_id"] if isinstance(extra.get("client_id"), str) else None
        now_s = self._clock()
        extra["create_time"] = int(now_s * 1000)
        number = float(body["number"]) if "number" in body else -self._seq if body.get("front") else self._seq
        return Job(
            prompt_id=body.get("prompt_id") or str(uuid.uuid4()),
            tenant=key.tenant,
            client_id=client_id,
            number=number,
            seq=self._seq,
            priority=self._priority(key, extra),
            graph=body["prompt"],
            extra=extra,
            outputs=verdict.outputs,
            files=verdict.files,
            created_s=now_s,
            size_bytes=len(msgspec.json.encode((body["prompt"], extra))),
        )

    def _priority(self, key: Key, extra: dict[str, Any]) -> int:
        """What `extra_data.swarmx.priority` asks for, as far as the tenant may have it."""
        ours = extra.get("swarmx")
        wanted = ours.get("priority") if isinstance(ours, dict) else None
        return max(-10, min(wanted if type(wanted) is int else 0, self._settings.tenant(key.tenant).priority))

    def _nobody(self, job: Job) -> dict[str, Any]:
        missing = self._book.missing(job.graph, job.needed, job.files)
        details = "; ".join(f"{name} lacks {', '.join(lacks[:5])}" for name, lacks in sorted(missing.items()))
        return error("no_server_has_all", "no single server has all that the graph needs", details)

    async def _may_load(self, key: Key, job: Job) -> bool:
        """Whether the outputs that the graph loads are the tenant's."""
        for node_id, name in job.files:
            if not await self._files.may_load(key.tenant, str(job.graph[node_id]["inputs"][name])):
                return False
        return True

    def _full(self, key: Key) -> web.Response | None:
        """429 where too many jobs wait, with the time in which some of them should be done."""
        ours, owed = self._settings, self._settings.tenant(key.tenant)
        own = self._scheduler.waits(key.tenant) + self._accepting[key.tenant]
        own_bytes = self._scheduler.waiting_bytes(key.tenant) + self._accepting_bytes[key.tenant]
        total = len(self._scheduler) + self._accepting.total()
        total_bytes = self._scheduler.waiting_bytes() + self._accepting_bytes.total()
        if own >= owed.max_waiting or total >= ours.max_waiting:
            details = f"{own} jobs of the tenant wait, {owed.max_waiting} may; {total} in all, {ours.max_waiting} may"
        elif own_bytes >= owed.max_waiting_bytes or total_bytes >= ours.max_waiting_bytes:
            details = (
                f"the jobs of the tenant that wait have {own_bytes} bytes, {owed.max_waiting_bytes} are allowed; "
                f"{total_bytes} in all, {ours.max_waiting_bytes} are allowed"
            )
        else:
            return None
        wait_s = self._scheduler.expected_wait_s(self._clock()) / max(1, len(self._scheduler))
        return refusal(
            429,
            error("queue_full", "too many jobs wait; try again later", details),
            {"Retry-After": str(max(1, min(3600, math.ceil(wait_s))))},
        )

    def _again(self, key: Key, job: Job, known: StoredJob) -> web.Response:
        """The id is taken: the answer may have been lost, and the client asks again."""
        if known.job.tenant == key.tenant and known.job.graph == job.graph:
            return answer({"prompt_id": job.prompt_id, "number": known.job.number, "node_errors": {}})
        return refusal(400, error("invalid_prompt_id", "another job has this prompt_id", job.prompt_id))

    # The queue

    async def queue(self, request: web.Request) -> web.Response:
        tenant = require(request, "read").sees
        return answer(
            {
                "queue_running": [job.row() for job in self._runner.running(tenant)],
                "queue_pending": [job.row() for job in self._scheduler.waiting(tenant)],
            }
        )

    async def change_queue(self, request: web.Request) -> web.Response:
        """Take out jobs that wait: those named by id, or with `clear` all of the tenant."""
        key = require(request, "submit")
        body = _dict(await read_json(request, self._settings.max_prompt_bytes))
        wanted = _ids(body.get("delete"))
        if body.get("clear"):
            wanted = [job.prompt_id for job in self._scheduler.waiting(_touches(key))]
        await self._stop(key, wanted, running=False)
        return web.Response()

    async def interrupt(self, request: web.Request) -> web.Response:
        """Stop the running job of this id, or all running jobs of the tenant."""
        key = require(request, "submit")
        wanted = _dict(await read_json(request, 65_536, lenient=True)).get("prompt_id")
        found = [job.prompt_id for job in self._runner.running(_touches(key)) if wanted in (None, "", job.prompt_id)]
        await self._stop(key, found)
        return web.Response()

    # History

    async def history(self, request: web.Request) -> web.Response:
        tenant = require(request, "read").sees
        limit, offset = whole_number(request, "max_items"), whole_number(request, "offset")
        limit = None if limit is None else max(0, min(_PAGE, limit))
        rows = await self._store.history(tenant, limit=limit, offset=-1 if offset is None else offset)
        entries = (_entry(prompt_id, history) for prompt_id, history in rows if history)
        return web.Response(body=b"{" + b",".join(entries) + b"}", content_type="application/json")

    async def one_history(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["prompt_id"]
        history = await self._store.history_of(prompt_id, require(request, "read").sees)
        entry = _entry(prompt_id, history) if history else b""
        return web.Response(body=b"{" + entry + b"}", content_type="application/json")

    async def change_history(self, request: web.Request) -> web.Response:
        key = require(request, "submit")
        body = _dict(await read_json(request, self._settings.max_prompt_bytes))
        await self._store.clear_history(key.tenant, None if body.get("clear") else _ids(body.get("delete")))
        return web.Response()

    # The jobs API

    async def jobs(self, request: web.Request) -> web.Response:
        """A page of all jobs. Only those that it shows are read."""
        tenant, workflow = require(request, "read").sees, request.query.get("workflow_id")
        running, pending = (
            [job for job in jobs if not workflow or job.workflow_id == workflow]
            for jobs in (self._runner.running(tenant), self._scheduler.waiting(tenant))
        )
        lines = {job.prompt_id: JobLine(job.prompt_id, "in_progress", job.created_s, None, None) for job in running}
        lines |= {job.prompt_id: JobLine(job.prompt_id, "pending", job.created_s, None, None) for job in pending}
        lines |= {line.prompt_id: line for line in await self._store.ended_lines(tenant, workflow)}  # some ended by now
        try:
            page = page_of(list(lines.values()), request.query)
        except ValueError as wrong:
            return answer({"error": str(wrong)}, status=400)
        ended = await self._store.some([line.prompt_id for line in page.lines if line.state in ENDED])
        rows = {job.prompt_id: _open(job, lines[job.prompt_id].state) for job in (*running, *pending)} | ended
        shown = [brief(rows[line.prompt_id]) for line in page.lines if line.prompt_id in rows]  # else it was cleared
        return answer({"jobs": shown, "pagination": page.pagination})

    async def job(self, request: web.Request) -> web.Response:
        row = await self._store.job(request.match_info["prompt_id"], require(request, "read").sees)
        return _no_job() if row is None else answer(detailed(row))

    async def cancel(self, request: web.Request) -> web.Response:
        """Cancel a job, wherever it is; one that has ended stays as it is."""
        key, prompt_id = require(request, "submit"), request.match_info["prompt_id"]
        row = await self._store.job(prompt_id, _touches(key))
        if row is None:
            return _no_job()
        return answer({"cancelled": bool(await self._stop(key, [prompt_id]))})

    async def cancel_many(self, request: web.Request) -> web.Response:
        key = require(request, "submit")
        body = _dict(await read_json(request, self._settings.max_prompt_bytes))
        cancelled = await self._stop(key, _ids(body.get("job_ids")))
        return answer({"cancelled": bool(cancelled), "job_ids": cancelled})

    async def _stop(self, key: Key, prompt_ids: list[str], *, running: bool = True) -> list[str]:
        """The jobs that end by it. What the key may not stop, or has ended, is left out."""
        stopped = await self._runner.cancel(prompt_ids, tenant=_touches(key), running=running)
        if stopped:
            self._trail.asked(key, "stop", {"jobs": stopped[:_TOLD], "count": len(stopped)})
        return stopped


def _open(job: Job, state: State) -> StoredJob:
    return StoredJob(job=job, state=state, server=None, attempts=0, started_s=None, ended_s=None, history=None)


def _entry(prompt_id: str, history: bytes) -> bytes:
    return msgspec.json.encode(prompt_id) + b":" + history


def _touches(key: Key) -> str | None:
    """Whose jobs the key may stop: its tenant's, or with the right to control everybody's."""
    return None if key.role in ("operator", "admin") else key.tenant


def _dict(body: Any) -> dict[str, Any]:
    return body if isinstance(body, dict) else {}


def _ids(raw: Any) -> list[str]:
    return [i for i in raw if isinstance(i, str)] if isinstance(raw, list) else []


def _no_job() -> web.Response:
    return answer({"error": error("job_not_found", "there is no such job")}, status=404)

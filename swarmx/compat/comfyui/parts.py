"""Jobs that run in parts: begins them, moves latents from one server to another, and makes one end of theirs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from swarmx.compat.comfyui.drafts import Fleet, is_ours, load_id, save_id
from swarmx.compat.comfyui.events import renamed
from swarmx.compat.comfyui.files import Files, files_in
from swarmx.compat.comfyui.graph import Graph, with_inputs
from swarmx.compat.comfyui.jobs import ENDED, Job, Outcome
from swarmx.compat.comfyui.merging import MergedEvents, merged
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.scheduling import Placement, Scheduler, Waiting
from swarmx.compat.comfyui.server import ComfyServer, ServerAway
from swarmx.compat.comfyui.settings import FrontSettings
from swarmx.compat.comfyui.splitting import Plan, Splitter, part_jobs
from swarmx.compat.comfyui.store import JobStore, StoredJob
from swarmx.gateway.keys import write_private

log = logging.getLogger(__name__)

_TRANSFER_S = 0.2  # a guess, until a latent has been moved
_WEIGHT = 0.3  # of the newest transfer in what the next one is thought to take


class Runs(Protocol):
    """What runs jobs, as parts need it."""

    relay: Any

    def begin(self, placement: Placement) -> None:
        """Run the job there, now."""
        ...

    def line_up(self, job: Job) -> None:
        """Run it where and when the scheduler says."""
        ...

    async def cancel(self, prompt_ids: Iterable[str], *, tenant: str | None, running: bool = True) -> list[str]:
        """End these jobs."""
        ...

    async def kept(self, write: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Until the store has it."""
        ...

    async def finish(self, job: Job, outcome: Outcome) -> None:
        """Store the end of a job, then tell it."""
        ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do it beside other things."""
        ...


@dataclass(slots=True, eq=False)
class _Split:
    """A job that runs in parts. `ends` are those of the parts that have ended, by number; `here` the latents that have
    come."""

    job: Job
    parts: list[Job]
    started_s: float
    facts: dict[str, Any]
    events: MergedEvents
    ends: dict[int, Outcome] = field(default_factory=dict)
    here: set[int] = field(default_factory=set)
    lined_up: set[int] = field(default_factory=set)
    cancelled: bool = False
    written: asyncio.Event = field(default_factory=asyncio.Event)
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def stopping(self) -> bool:
        """Whether nothing of it is to be begun any more."""
        return self.cancelled or any(end.state != "completed" for end in self.ends.values())

    def open_parts(self) -> list[Job]:
        return [part for number, part in enumerate(self.parts) if number not in self.ends]

    def ready(self) -> list[int]:
        """The parts that have all latents that they need and were not yet lined up: from now on they are."""
        found = [
            n for n, part in enumerate(self.parts) if n not in self.lined_up and self.here.issuperset(_needs(part))
        ]
        self.lined_up.update(found)
        return found


class Parts:
    """All jobs that run in parts now. A latent on its way is kept in `folder`, so that the loss of the server that
    made it loses nothing else."""

    def __init__(
        self,
        *,
        settings: FrontSettings,
        store: JobStore,
        scheduler: Scheduler,
        book: NodeBook,
        files: Files,
        runs: Runs,
        folder: Path,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._store = store
        self._scheduler = scheduler
        self._book = book
        self._files = files
        self._runs = runs
        self._folder = folder
        self._clock = clock
        self._transfer_s = _TRANSFER_S
        self._splits: dict[str, _Split] = {}
        self._splitter = Splitter(
            specs=lambda: book.specs,
            able=lambda graph, files: book.able(graph, graph, files),
            forecast=scheduler.forecast,
            told=settings.split_classes,
        )

    # What others see

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self._splits

    def running(self, tenant: str | None) -> list[tuple[float, Job]]:
        """The jobs, each with when it began."""
        found = self._splits.values()
        return [(split.started_s, split.job) for split in found if tenant in (None, split.job.tenant)]

    def waiting(self, tenant: str | None) -> int:
        """Parts that wait for a server."""
        found = (part for split in self._splits.values() for part in split.parts if tenant in (None, part.tenant))
        return sum(part.prompt_id in self._scheduler for part in found)

    def cancelled(self, prompt_id: str, tenant: str | None) -> list[str]:
        """The parts that are to be cancelled with the job; none where the tenant has no such job."""
        split = self._splits.get(prompt_id)
        if split is None or tenant not in (None, split.job.tenant):
            return []
        split.cancelled = True
        return [part.prompt_id for part in split.open_parts()]

    # To its beginning

    def divide(self, placement: Placement, now_s: float) -> bool:
        """Run a job that was placed in parts instead, where that pays. False where it does not."""
        waiting = placement.waiting
        if not self._settings.split or waiting.attempt or waiting.job.part is not None:
            return False
        try:
            plan = self._plan(placement, now_s)
        except Exception:
            log.exception("the job %s stays whole: no parts could be planned", waiting.job.prompt_id)
            return False
        if plan is None:
            return False
        log.info("the job %s is %s", waiting.job.prompt_id, plan.explanation)
        split = self._split(waiting.job, part_jobs(waiting.job, plan), now_s)
        split.facts = {"expected_s": plan.seconds, "whole_s": plan.whole_s, "extra_s": plan.extra_s}
        why = msgspec.structs.replace(placement.decision, note=plan.explanation)
        self._runs.spawn(self._write(split, why))
        for number in split.ready():
            part, planned = split.parts[number], plan.parts[number]
            there = Waiting(job=part, able=frozenset({planned.server}), since_s=waiting.since_s)
            placed = self._scheduler.placed(there, now_s)
            if placed is None:
                self._runs.line_up(part)
            else:
                self._runs.begin(placed)
        return True

    def _plan(self, placement: Placement, now_s: float) -> Plan | None:
        """With nobody behind it, servers that will be free by the time may count; else those that are free now."""
        waiting, scheduler = placement.waiting, self._scheduler
        idle = scheduler.idle
        names = waiting.able & (idle if len(scheduler) else idle | scheduler.running.keys())
        left = {name: scheduler.running[name].left_s(now_s) if name in scheduler.running else 0.0 for name in names}
        fleet = Fleet(
            states={name: scheduler.states[name] for name in sorted(names)},
            free_in_s=left,
            waiting=len(scheduler),
            up=len(idle | scheduler.running.keys()),
            transfer_s=self._transfer_s,
        )
        return self._splitter.plan(waiting.job, waiting.facts, placement.server, fleet)

    def _split(self, job: Job, parts: list[Job], started_s: float) -> _Split:
        split = _Split(job, parts, started_s, {}, MergedEvents(job.prompt_id))
        self._splits[job.prompt_id] = split
        return split

    async def _write(self, split: _Split, why: Any) -> None:
        await self._runs.kept(lambda: self._store.split(split.job.prompt_id, split.parts, split.started_s, why))
        split.written.set()

    async def written(self, job: Job) -> None:
        """Until the part is stored: none runs before."""
        split = self._splits.get(job.part.of) if job.part else None
        if split is not None:
            await split.written.wait()

    async def recover(self, row: StoredJob, rows: list[StoredJob]) -> list[StoredJob]:
        """Go on with a job that an earlier life split; gives the parts that ran at a server then, or wait for one."""
        started_s = row.job.created_s if row.started_s is None else row.started_s
        split = self._split(row.job, [part.job for part in rows], started_s)
        split.written.set()
        for number, kept in enumerate(rows):
            if kept.history:
                split.ends[number] = msgspec.json.decode(kept.history, type=Outcome)
            elif kept.state in ENDED:
                split.ends[number] = Outcome(state=kept.state)
        if not split.open_parts():
            await self._end(split)
            return []
        if split.stopping:
            self._runs.spawn(self._stop(split))
        for number, part in enumerate(split.parts):
            split.here |= {n for n in _makes(part) if number in split.ends or self._latent(split, n).exists()}
        split.ready()
        return [kept for number, kept in enumerate(rows) if number in split.lined_up - split.ends.keys()]

    def sweep(self) -> None:
        """Drop latents that no job waits for."""
        for path in self._folder.glob("*.latent*"):
            if path.name.partition(".")[0] not in self._splits:
                path.unlink(missing_ok=True)

    # On its way

    def heard(self, part: Job, kind: str, data: dict[str, Any]) -> None:
        """An event of a part, with its files named as the server's."""
        split, number = self._of(part)
        if split is None:
            return
        if kind == "executed":
            for latent in _makes(part):
                if data.get("node") == save_id(latent):
                    self._runs.spawn(self._move(split, latent, data.get("output")))
        told = split.events.heard(number, kind, data)
        if told is not None:
            self._runs.relay.send(part.tenant, part.client_id, *told)

    def preview(self, part: Job, frame: bytes) -> bytes:
        """A binary frame of a part as one of the job."""
        return frame if part.part is None else renamed(frame, part.part.of)

    async def localised(self, part: Job, graph: Graph, server: ComfyServer) -> Graph:
        """The graph with the latents that the part loads, which the server has by then. Raises ServerAway."""
        split, _ = self._of(part)
        if split is None:
            return graph
        names: dict[tuple[str, str], object] = {}
        for latent in _needs(part):
            began_s = self._clock()
            data = await asyncio.to_thread(self._latent(split, latent).read_bytes)
            names[load_id(latent), "latent"] = await self._files.copy(server, "of.latent", data)
            self._transfer_s += _WEIGHT * (2.0 * (self._clock() - began_s) - self._transfer_s)  # it came as long a way
        return with_inputs(graph, names)

    async def has_made(self, part: Job, outputs: dict[str, Any]) -> bool:
        """Whether what other parts need of this one is here, now that it has ended."""
        split, _ = self._of(part)
        if split is None:
            return True
        return all([await self._move(split, latent, outputs.get(save_id(latent))) for latent in _makes(part)])

    async def _move(self, split: _Split, latent: int, output: Any) -> bool:
        """Fetch the latent, and let the parts go on that waited for it last."""
        async with split.moving:
            path = self._latent(split, latent)
            if not path.exists():
                found = next(files_in(output), None)
                try:
                    data = (
                        None if found is None else await self._files.content(split.job.tenant, found[0], _path(found))
                    )
                except ServerAway as away:
                    log.warning("the latent of %s could not be fetched: %s", split.job.prompt_id, away)
                    data = None
                if data is None:
                    return False
                path.parent.mkdir(exist_ok=True, mode=0o700)
                await asyncio.to_thread(write_private, path, data)
        split.here.add(latent)
        for number in split.ready() if not split.stopping else ():
            self._runs.line_up(split.parts[number])
        return True

    # To its end

    async def ended(self, part: Job, end: Outcome) -> None:
        """A part has ended, and that is stored. The job ends with its last part; a part that fails stops the others."""
        split, number = self._of(part)
        if split is None:
            return
        split.ends[number] = end
        if split.stopping:
            await self._stop(split)
        if not split.open_parts() and self._splits.get(split.job.prompt_id) is split:
            await self._end(split)

    async def _stop(self, split: _Split) -> None:
        for number in range(len(split.parts)):
            if number not in split.lined_up:  # it waits for a latent that will not come
                split.ends.setdefault(number, Outcome(state="cancelled"))
        await self._runs.cancel([part.prompt_id for part in split.open_parts()], tenant=None)

    async def _end(self, split: _Split) -> None:
        del self._splits[split.job.prompt_id]
        ends = [split.ends[number] for number in range(len(split.parts))]
        rows = [
            {"outputs": [output for output in part.outputs if not is_ours(output)], **end.facts}
            for part, end in zip(split.parts, ends, strict=True)
        ]
        facts = {
            "server": next((row["server"] for row in reversed(rows) if row.get("server")), None),
            "attempts": max([row.get("attempts", 1) for row in rows]),
            "queue_s": round(split.started_s - split.job.created_s, 4),
            **split.facts,
            "parts": rows,
        }
        await self._runs.finish(split.job, merged(split.job, ends, cancelled=split.cancelled, facts=facts))
        for part in split.parts:
            for latent in _makes(part):
                self._latent(split, latent).unlink(missing_ok=True)

    def _of(self, part: Job) -> tuple[_Split | None, int]:
        return (None, 0) if part.part is None else (self._splits.get(part.part.of), part.part.number)

    def _latent(self, split: _Split, latent: int) -> Path:
        return self._folder / f"{split.job.prompt_id}.{latent}.latent"


def _makes(part: Job) -> tuple[int, ...]:
    return part.part.makes if part.part else ()


def _needs(part: Job) -> tuple[int, ...]:
    return part.part.needs if part.part else ()


def _path(file: tuple[str, str, str]) -> str:
    _, subfolder, name = file
    return f"{subfolder}/{name}" if subfolder else name

"""Doing jobs: two processes, a line of progress, and a file of what is done."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.experiment.grounds import Grounds, Wanted
from eval.experiment.jobs import Job, Run, run_job
from eval.experiment.store import RunFile

_EVERY_S = 30.0  # between two lines of progress, where there is no terminal


class Pool:
    """Workers for as long as the context lasts. With one worker, jobs are done in this process."""

    def __init__(self, grounds: Grounds, workers: int) -> None:
        self.grounds = grounds
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self.console = Console(stderr=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, jobs: Sequence[Job], runs: RunFile, what: str) -> list[Run]:
        """The runs of these jobs, in their order; only those are done that are not in the file. Raises ConfigError."""
        todo = sorted(runs.missing(jobs, self.grounds), key=_by_workload)
        if todo:
            with self._progress(what, len(todo)) as step:
                for run in self._done(todo):
                    runs.add(run)
                    step()
        return [done for job in jobs if (done := runs.get(job, self.grounds)) is not None]

    def _done(self, todo: Sequence[Job]) -> Iterator[Run]:
        if self._workers == 1 or len(todo) == 1:
            yield from (run_job(job, self.grounds) for job in todo)
            return
        if self._executor is None:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._workers, mp_context=context)
        if not self.grounds.is_toy:  # built once and kept on disk, so that two workers do not build the same
            contents = {msgspec.json.encode(job.workload.content): job.workload for job in todo}
            for built in [self._executor.submit(_prepare, self.grounds, wanted) for wanted in contents.values()]:
                built.result()
        pending: set[Future[Run]] = {self._executor.submit(run_job, job, self.grounds) for job in todo}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        if not sys.stderr.isatty():
            began_s = time.monotonic()
            done, told_s = 0, began_s

            def step() -> None:
                nonlocal done, told_s
                done += 1
                now_s = time.monotonic()
                if done == total or now_s - told_s >= _EVERY_S:
                    told_s = now_s
                    self.console.print(f"{what}: {done} of {total} runs, {now_s - began_s:.0f} s", highlight=False)

            yield step
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)


def _prepare(grounds: Grounds, wanted: Wanted) -> None:
    grounds.build(wanted)


def _by_workload(job: Job) -> bytes:
    return msgspec.json.encode(job.workload, order="deterministic")

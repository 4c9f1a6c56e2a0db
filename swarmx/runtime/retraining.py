"""Trains heads again in another process while the old ones serve, and puts the better ones in force."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from swarmx.core.actions import Retrain, UsePredictor
from swarmx.core.errors import PredictorError, StoreError
from swarmx.core.messages import Message, PredictorReady, RetrainEnded, RetrainOutcome
from swarmx.core.records import CallRecord
from swarmx.neural.checkpoint import load_head, save_head
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.table import Table
from swarmx.neural.training import retrain

log = logging.getLogger(__name__)

_CHILD = "-m", "swarmx.neural.training.retrain"
# Where util-linux is, the kernel ends the child even when its parent is killed before it can.
_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
_WORK = ".work-"
_IN_FORCE = ".in_force"
_LAST_WORDS = 300
_NOTHING = retrain.JobResult(version="", loss_before=0.0, loss_after=0.0, rows=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainable:
    """A head that can be trained again.

    `head` gives the one in force; `table_of` makes rows of finished calls, oldest first, and leaves out what the head
    cannot learn from (another encoder, say; it runs in a thread); `swap` puts a head in force, on the loop, and
    returns the one before. Both may raise PredictorError. `reads` is the version of the encoder, if there is one: a
    head trained again is of no use to another.
    """

    head: Callable[[], Head]
    table_of: Callable[[Sequence[CallRecord]], Table]
    swap: Callable[[Head], Head]
    reads: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainingSettings:
    """How a head is trained again: on the newest `records` calls, if at least `least_rows` of them can be used.

    A process that takes longer than `timeout_s` is killed. `kept` versions stay on disk, and in memory for a rollback.
    For the rest see `neural.training.retrain.Job`.
    """

    method: retrain.Method = "refit"
    records: int = 5000
    least_rows: int = 200
    half_life: float = 300.0
    gain: float = 0.01
    timeout_s: float = 300.0
    kept: int = 5


class Retraining:
    """Performs Retrain and UsePredictor; nothing is raised to those who asked.

    A head is trained on the newest calls of all keys, not only of those that drifted: it serves them all, and what it
    knows of the others must not be lost. Their age decides how much they weigh.

    Every Retrain is answered by one RetrainEnded, "failed" whatever went wrong: no records, a child that died, was too
    slow or wrote nonsense. UsePredictor is answered by PredictorReady, or not at all where the version cannot be had:
    what is in force then stays. One child at a time: the next retraining waits for it. `newest` reads that many
    finished calls from memory, oldest first. `child` is the command that is run with a folder to work in.
    """

    def __init__(
        self,
        heads: Mapping[str, Trainable],
        *,
        newest: Callable[[int], Awaitable[list[CallRecord]]],
        folder: Path,
        post: Callable[[Message], None],
        settings: RetrainingSettings | None = None,
        child: Sequence[str] = (sys.executable, *_CHILD),
    ) -> None:
        self._heads = dict(heads)
        self._newest = newest
        self._folder = folder
        self._post = post
        self._settings = settings or RetrainingSettings()
        self._child = tuple(child)
        self._earlier: OrderedDict[str, Head] = OrderedDict()  # heads that were in force, by version
        self._one_at_a_time = asyncio.Semaphore(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: set[str] = set()  # reasons of failures that were logged as warnings
        self._closed = False

    def perform_retrain(self, action: Retrain) -> None:
        self._spawn(partial(self._retrain, action), f"retrain {action.head}")

    def perform_use(self, action: UsePredictor) -> None:
        self._spawn(partial(self._use, action), f"use {action.version}")

    async def close(self) -> None:
        """Kill the child and call off what waits."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _retrain(self, action: Retrain) -> None:
        result = None
        try:
            async with self._one_at_a_time:
                result = await self._result(action)
        except (PredictorError, StoreError, OSError) as error:
            self._tell(action.head, str(error))
        except Exception:  # whoever waits for the end must hear of it
            log.exception("the head %s could not be trained again", action.head)
        outcome: RetrainOutcome = "failed" if result is None else "better" if result.version else "worse"
        result = result or _NOTHING
        if outcome != "failed":
            losses = result.loss_after, result.loss_before
            log.info("head %s trained again on %d rows: loss %.4f, %.4f before", action.head, result.rows, *losses)
        self._post(
            RetrainEnded(
                retrain_id=action.retrain_id,
                head=action.head,
                outcome=outcome,
                version=result.version,
                loss_before=result.loss_before,
                loss_after=result.loss_after,
            )
        )

    async def _result(self, action: Retrain) -> retrain.JobResult:
        trainable = self._trainable(action.head)
        work = self._folder / f"{_WORK}{action.head}"
        head = trainable.head()
        records = await self._newest(self._settings.records)
        try:
            await asyncio.to_thread(self._write_job, work, head, trainable, records)
            await self._run_child(work)
            return await asyncio.to_thread(self._take, work, head)
        finally:
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)

    def _write_job(self, work: Path, head: Head, trainable: Trainable, records: Sequence[CallRecord]) -> None:
        table = trainable.table_of(records)
        if len(table) < self._settings.least_rows:
            raise PredictorError(
                f"{len(table)} of the last {len(records)} finished calls can teach the head {head.spec.name}, "
                f"{self._settings.least_rows} are needed; wait for more."
            )
        for left in self._folder.glob(f"{_WORK}*"):  # by a life that ended in the middle
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir(parents=True)
        job = retrain.Job(
            spec=head.spec,
            method=self._settings.method,
            half_life=self._settings.half_life,
            gain=self._settings.gain,
        )
        (work / retrain.JOB).write_bytes(msgspec.json.encode(job))
        retrain.write_rows(work / retrain.ROWS, table)
        save_head(work / retrain.BEFORE, head, {"licence": "as the weights before"})

    async def _run_child(self, work: Path) -> None:
        words = work / "stderr"
        with words.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *_DIES_WITH_PARENT,
                *self._child,
                str(work),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                status = await process.wait()
        except TimeoutError:
            raise PredictorError(
                f"the training took longer than {self._settings.timeout_s:g} s and was ended; allow it more time."
            ) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if status != 0:
            said = words.read_text(errors="replace").strip()[-_LAST_WORDS:]
            raise PredictorError(f"the training ended with status {status}: {said or 'it said nothing'}")

    def _take(self, work: Path, head: Head) -> retrain.JobResult:
        """Trust nothing that the child wrote before it has been looked at; then keep its head under its version."""
        try:
            result = msgspec.json.decode((work / retrain.RESULT).read_bytes(), type=retrain.JobResult)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PredictorError(f"the training left no result that can be read: {error}") from None
        if not np.isfinite([result.loss_before, result.loss_after]).all():
            raise PredictorError(f"the training reported losses that are not numbers: {result}")
        if result.version:
            new, card = load_head(work / retrain.AFTER, head.spec)
            _check(new)
            if card.version != result.version:
                raise PredictorError(f"the training spoke of {result.version} and left {card.version}")
            place = self._folder / result.version
            if not place.exists():  # equal weights have equal versions
                (work / retrain.AFTER).replace(place)
            self._prune(place)
        return result

    def _prune(self, newest: Path) -> None:
        """Keep the newest versions, and those that may be in force."""
        versions = [path for path in self._folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        in_force = {trainable.head().version for trainable in self._heads.values()}
        old = sorted((p for p in versions if p != newest), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in old[self._settings.kept - 1 :]:
            if path.name not in in_force:
                shutil.rmtree(path, ignore_errors=True)

    async def _use(self, action: UsePredictor) -> None:
        try:
            trainable = self._trainable(action.head)
            head = await self._version(action.version, trainable)
            previous = trainable.swap(head)
        except PredictorError as error:
            log.warning("version %s of the head %s cannot be used: %s", action.version, action.head, error)
            return
        except Exception:  # what is in force stays
            log.exception("version %s of the head %s could not be put in force", action.version, action.head)
            return
        self._earlier[previous.version] = previous
        self._earlier.move_to_end(previous.version)
        while len(self._earlier) > self._settings.kept:
            self._earlier.popitem(last=False)
        log.info("the head %s is %s now, was %s", action.head, head.version, previous.version)
        await asyncio.to_thread(self._note, action.head, _Note(version=head.version, reads=trainable.reads))
        self._post(PredictorReady(head=action.head, version=head.version, previous=previous.version))

    def _note(self, head: str, note: _Note) -> None:
        """Write down what is in force, for the next life."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = self._folder / f".{head}.new"
            draft.write_bytes(msgspec.json.encode(note))
            draft.replace(self._folder / f"{head}{_IN_FORCE}")
        except OSError as error:
            log.warning("after a restart the head %s will be an older one: %s", head, error)

    async def _version(self, version: str, trainable: Trainable) -> Head:
        """The head that was in force before, or the one on disk. Raises PredictorError."""
        spec = trainable.head().spec
        earlier = self._earlier.get(version)
        if earlier is not None and earlier.spec == spec:
            return earlier
        if not version or Path(version).name != version:
            raise PredictorError(f"{version!r} is not the name of a version")
        head, _ = await asyncio.to_thread(load_head, self._folder / version, spec)
        _check(head)
        return head

    def _trainable(self, name: str) -> Trainable:
        trainable = self._heads.get(name)
        if trainable is None:
            known = ", ".join(self._heads) or "none"
            raise PredictorError(f"there is no head {name!r} that can be trained here, only: {known}")
        return trainable

    def _tell(self, head: str, reason: str) -> None:
        """The same reason again is no news to an operator."""
        key = f"{head}: {reason[:60]}"
        level = logging.INFO if key in self._told else logging.WARNING
        if len(self._told) < 100:
            self._told.add(key)
        log.log(level, "the head %s was not trained again: %s", head, reason)

    def _spawn(self, work: Callable[[], Coroutine[None, None, None]], name: str) -> None:
        if self._closed:
            log.info("%s comes too late, SwarmX stops", name)
            return
        task = asyncio.create_task(work(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """Which version of a head is in force, and the version of the encoder that it reads."""

    version: str
    reads: str


def in_force(folder: Path, spec: HeadSpec, reads: str) -> Head | None:
    """The head that was in force when the last life ended; None when that was the one that it began with, or when it
    reads another encoder than `reads`: other weights have been installed since.

    Raises PredictorError when it is there and cannot be used.
    """
    try:
        note = msgspec.json.decode((folder / f"{spec.name}{_IN_FORCE}").read_bytes(), type=_Note)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if note.reads != reads or Path(note.version).name != note.version or not (folder / note.version).is_dir():
        return None
    head, _ = load_head(folder / note.version, spec)
    _check(head)
    return head


def _check(head: Head) -> None:
    """Raises PredictorError unless the head forecasts something sane for rows about which nothing is known."""
    features = np.full((1, len(head.spec.features)), np.nan, dtype=np.float32)
    q = head.log_quantiles(features, np.zeros(1))
    if not np.isfinite(q).all() or np.abs(q).max() > 50.0 or (np.diff(q) < 0.0).any():
        raise PredictorError(f"the head {head.version} forecasts {q[0].tolist()} where nothing is known: not sane.")

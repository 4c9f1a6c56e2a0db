"""Where jobs and uploads survive the front: one SQLite file, and a folder of files by the hash of their content."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from swarmx.compat.comfyui.jobs import Ended, File, Job, State, workflow_in
from swarmx.compat.comfyui.schema import connected
from swarmx.core.errors import StoreError
from swarmx.core.nouns import Decision
from swarmx.gateway.keys import write_private
from swarmx.memory.lane import Lane, explained

T = TypeVar("T")

_PRUNE_EVERY = 250  # ends
_NEWEST = 64  # ended jobs whose history is in memory
_MOST_PARTS = 64  # of a job: parts are numbered below 0, as many for each job


class StoredJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job with what has become of it."""

    job: Job
    state: State
    server: str | None
    attempts: int
    started_s: float | None
    ended_s: float | None
    history: bytes | None


class _Sent(msgspec.Struct, frozen=True):
    """Of a job that was kept, what its client sent beside the graph."""

    extra: dict[str, Any]


class JobLine(NamedTuple):
    """A job in a list, without its graph."""

    prompt_id: str
    state: State
    created_s: float
    started_s: float | None
    ended_s: float | None


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A file as its client named it. Its content lies under its hash."""

    tenant: str
    folder: str
    subfolder: str
    name: str
    sha256: str

    @property
    def path(self) -> str:
        """How inputs name it."""
        return f"{self.subfolder}/{self.name}" if self.subfolder else self.name


class JobStore:
    """Writes return once they are on disk (WAL, synchronous=FULL); those of the same moment share one commit.

    Keeps the newest `keep` ended jobs, and a few hundred more between two clearings.
    """

    def __init__(self, folder: Path, *, keep: int = 10_000) -> None:
        self._folder = folder
        self._keep = keep
        self._lane: Lane | None = None
        self._ends = 0
        self._newest: OrderedDict[str, tuple[str, bytes]] = OrderedDict()  # tenant and history: soon asked for
        self.on_decision: Callable[[str, Decision], None] = lambda prompt_id, decision: None
        """Hears where a job goes, once that is kept."""

    async def open(self) -> None:
        """Create or open the database in the folder. Raises StoreError."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._folder / "files").mkdir(exist_ok=True, mode=0o700)
        try:
            self._lane = await Lane.open(self._connect, name="comfyui-jobs", commits=True)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the jobs in {self._folder} cannot be opened: {explained(error)}") from error

    async def close(self) -> None:
        if self._lane is not None:
            await self._lane.close()
            self._lane = None

    async def accept(self, job: Job) -> StoredJob | None:
        """Keep a new job; None when that is done, the job of this id when there is one already."""

        def work(db: sqlite3.Connection) -> StoredJob | None:
            known = db.execute(f"{_SELECT} WHERE prompt_id = ?", (job.prompt_id,)).fetchone()
            if known is not None:
                return _read(known)
            db.execute(
                "INSERT INTO job (prompt_id, tenant, seq, state, body, created_s) VALUES (?, ?, ?, 'pending', ?, ?)",
                (job.prompt_id, job.tenant, job.seq, msgspec.json.encode(job), job.created_s),
            )
            return None

        return await self.do(work)

    async def forget(self, prompt_id: str) -> None:
        """The job was never accepted after all: a server said so before its client heard anything."""
        await self.do(lambda db: _forget(db, "prompt_id = ?", (prompt_id,)))

    async def started(self, prompt_id: str, server: str, at_s: float, decision: Decision | None) -> None:
        """One more attempt begins, on the server."""

        def work(db: sqlite3.Connection) -> str | None:
            db.execute(
                "UPDATE job SET state = 'in_progress', server = ?, attempts = attempts + 1, started_s = ? "
                "WHERE prompt_id = ? AND ended_s IS NULL",
                (server, at_s, prompt_id),
            )
            found = db.execute("SELECT parent FROM job WHERE prompt_id = ?", (prompt_id,)).fetchone()
            parent = None if found is None else found[0]
            if decision is not None:
                _decided(db, parent or prompt_id, None if parent else decision.attempt, decision)
            return parent

        parent = await self.do(work)
        if decision is not None:
            self.on_decision(parent or prompt_id, decision)

    async def split(self, prompt_id: str, parts: Sequence[Job], at_s: float, decision: Decision) -> None:
        """The job begins in parts. They are kept with it until it ends; why each went where it went is kept as its."""

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE job SET state = 'in_progress', attempts = 1, started_s = ? WHERE prompt_id = ?",
                (at_s, prompt_id),
            )
            _decided(db, prompt_id, decision.attempt, decision)
            db.executemany(
                "INSERT INTO job (prompt_id, tenant, seq, state, body, created_s, parent) "
                "VALUES (?, ?, ?, 'pending', ?, ?, ?)",
                [
                    (part.prompt_id, part.tenant, -seq, msgspec.json.encode(part), part.created_s, prompt_id)
                    for seq, part in enumerate(parts, start=parts[0].seq * _MOST_PARTS)
                ],
            )

        await self.do(work)
        self.on_decision(prompt_id, decision)

    async def parts(self, prompt_id: str) -> list[StoredJob]:
        """The parts of a job that has not ended, in their order; none of one that runs in one piece."""
        query = f"{_SELECT} WHERE parent = ? ORDER BY seq DESC"
        return await self.do(lambda db: [_read(row) for row in db.execute(query, (prompt_id,))])

    async def back(self, prompt_id: str, *, attempts: int) -> None:
        """The attempt is over and the job waits again; `attempts` of its attempts count."""
        await self.do(
            lambda db: (
                db.execute(
                    "UPDATE job SET state = 'pending', server = NULL, attempts = ? "
                    "WHERE prompt_id = ? AND ended_s IS NULL",
                    (attempts, prompt_id),
                )
                and None
            )
        )

    async def ended(self, prompt_id: str, end: Ended, made: Sequence[File], found: Sequence[File] = ()) -> bool:
        """Keep the one end of a job, and which files are its tenant's by it. False when it had ended before: then
        nothing changes.

        Those that it `made` are nobody else's from now on: once the disk of a server was cleared, it gives names again.
        Those that it `found`, made by nodes whose results its server still had, are also its tenant's.
        """

        def work(db: sqlite3.Connection) -> tuple[str, str | None] | None:
            row: tuple[str, str | None] | None = db.execute(
                "UPDATE job SET state = ?, ended_s = ?, history = ? WHERE prompt_id = ? AND ended_s IS NULL "
                "RETURNING tenant, parent",
                (end.state, end.ended_s, end.history, prompt_id),
            ).fetchone()
            if row is None:
                return None
            _without_secrets(db, prompt_id)
            db.execute("DELETE FROM job WHERE parent = ?", (prompt_id,))
            tenant, parent = row
            db.executemany("DELETE FROM output WHERE folder = ? AND subfolder = ? AND name = ?", made)
            query = "INSERT OR IGNORE INTO output (tenant, prompt_id, made_s, folder, subfolder, name) VALUES "
            values = tenant, parent or prompt_id, end.ended_s
            db.executemany(f"{query} (?, ?, ?, ?, ?, ?)", [(*values, *file) for file in (*made, *found)])
            self._ends += 1
            if self._ends % _PRUNE_EVERY == 0:
                _prune(db, self._keep)
            return row

        changed = await self.do(work)
        if changed is not None and changed[1] is None:
            self._newest[prompt_id] = changed[0], end.history
            if len(self._newest) > _NEWEST:
                self._newest.popitem(last=False)
        return changed is not None

    async def cancelled(self, prompt_ids: Sequence[str], at_s: float) -> None:
        """These jobs end before they began."""

        def work(db: sqlite3.Connection) -> None:
            query = "UPDATE job SET state = 'cancelled', ended_s = ? WHERE prompt_id = ? AND ended_s IS NULL"
            db.executemany(query, [(at_s, prompt_id) for prompt_id in prompt_ids])
            for prompt_id in prompt_ids:
                _without_secrets(db, prompt_id)

        await self.do(work)

    async def open_jobs(self) -> list[StoredJob]:
        """All that have not ended, oldest first."""
        where = "WHERE state IN ('pending', 'in_progress') AND parent IS NULL ORDER BY seq"
        return await self.do(lambda db: [_read(row) for row in db.execute(f"{_SELECT} {where}")])

    async def last_seq(self) -> int:
        """The highest number that a job was given."""
        return await self.do(lambda db: int(db.execute("SELECT coalesce(max(seq), 0) FROM job").fetchone()[0]))

    async def job(self, prompt_id: str, tenant: str | None) -> StoredJob | None:
        """One job that the tenant may see (None: any)."""

        def work(db: sqlite3.Connection) -> StoredJob | None:
            where = "WHERE prompt_id = ? AND parent IS NULL AND ifnull(?, tenant) = tenant"
            row = db.execute(f"{_SELECT} {where}", (prompt_id, tenant))
            found = row.fetchone()
            return None if found is None else _read(found)

        return await self.do(work)

    async def history_of(self, prompt_id: str, tenant: str | None) -> bytes:
        """What `/history` shows of one job that the tenant may see (None: any); empty for one that has not ended."""
        newest = self._newest.get(prompt_id)
        if newest is not None:
            return newest[1] if tenant in (None, newest[0]) else b""
        row = await self.job(prompt_id, tenant)
        return b"" if row is None or row.history is None else row.history

    async def history(self, tenant: str | None, *, limit: int | None, offset: int) -> list[tuple[str, bytes]]:
        """Id and history of ended jobs that have one, oldest end first; with a negative offset, the newest `limit`."""
        newest = offset < 0 and limit is not None
        query = (
            "SELECT prompt_id, history FROM job WHERE ended_s IS NOT NULL AND parent IS NULL AND length(history) > 0"
        )
        order = f"AND ifnull(?, tenant) = tenant ORDER BY ended_s {'DESC' if newest else 'ASC'} LIMIT ? OFFSET ?"
        row = (tenant, -1 if limit is None else limit, 0 if newest else max(0, offset))
        return (await self.do(lambda db: db.execute(f"{query} {order}", row).fetchall()))[:: -1 if newest else 1]

    async def ended_lines(self, tenant: str | None, workflow_id: str | None = None) -> list[JobLine]:
        """All ended jobs, or those of a workflow, newest end first: no graph is read."""
        body = "body" if workflow_id else "NULL"
        query = f"SELECT prompt_id, state, created_s, started_s, ended_s, {body} FROM job"  # noqa: S608
        where = "WHERE ended_s IS NOT NULL AND parent IS NULL AND ifnull(?, tenant) = tenant ORDER BY ended_s DESC"

        def work(db: sqlite3.Connection) -> list[JobLine]:
            rows = db.execute(f"{query} {where}", (tenant,))
            return [JobLine(*row) for *row, body in rows if not workflow_id or _workflow_of(body) == workflow_id]

        return await self.do(work)

    async def some(self, prompt_ids: Sequence[str]) -> dict[str, StoredJob]:
        """These jobs, as far as they are there."""

        def work(db: sqlite3.Connection) -> dict[str, StoredJob]:
            rows = (db.execute(f"{_SELECT} WHERE prompt_id = ?", (key,)).fetchone() for key in prompt_ids)
            return {row.job.prompt_id: row for row in map(_read, filter(None, rows))}

        return await self.do(work)

    async def clear_history(self, tenant: str, prompt_ids: Sequence[str] | None) -> None:
        """Forget ended jobs of the tenant, and what they made: these, or all."""

        def work(db: sqlite3.Connection) -> None:
            if prompt_ids is None:
                db.execute("DELETE FROM output WHERE tenant = ?", (tenant,))
                _forget(db, "ended_s IS NOT NULL AND parent IS NULL AND tenant = ?", (tenant,))
            for prompt_id in prompt_ids or ():
                where = "prompt_id = ? AND tenant = ? AND parent IS NULL AND ended_s IS NOT NULL"
                _forget(db, where, (prompt_id, tenant))
                db.execute("DELETE FROM output WHERE tenant = ? AND prompt_id = ?", (tenant, prompt_id))

        await self.do(work)
        self._newest.clear()

    async def decisions(self, prompt_id: str) -> list[Decision]:
        """Why the job went where it went, attempt by attempt."""
        query = "SELECT body FROM decision WHERE prompt_id = ? ORDER BY attempt"
        return await self.do(
            lambda db: [msgspec.json.decode(row[0], type=Decision) for row in db.execute(query, (prompt_id,))]
        )

    async def made(self, tenant: str, folder: str, subfolder: str, name: str) -> bool:
        """Whether a job of the tenant made the file."""
        query = "SELECT 1 FROM output WHERE tenant = ? AND folder = ? AND subfolder = ? AND name = ?"
        row = (tenant, folder, subfolder, name)
        return await self.do(lambda db: db.execute(query, row).fetchone() is not None)

    async def keep_upload(self, upload: Upload, data: bytes) -> None:
        """Keep a file; another one of the same name and tenant is replaced. Its content is kept once."""
        path = self.content(upload.sha256)
        if not path.exists():
            try:
                await asyncio.to_thread(write_private, path, data)
            except OSError as error:
                raise StoreError(f"the upload cannot be kept: {error.strerror or error}; is the disk full?") from None
        row = (upload.tenant, upload.folder, upload.subfolder, upload.name, upload.sha256)
        await self.do(lambda db: db.execute("INSERT OR REPLACE INTO upload VALUES (?, ?, ?, ?, ?)", row) and None)

    async def uploads(self) -> list[Upload]:
        """All files."""
        query = "SELECT tenant, folder, subfolder, name, sha256 FROM upload"
        fields = ("tenant", "folder", "subfolder", "name", "sha256")
        return await self.do(lambda db: [Upload(**dict(zip(fields, row, strict=True))) for row in db.execute(query)])

    @property
    def latents(self) -> Path:
        """Where latents lie that are on their way from one server to another."""
        return self._folder / "latents"

    async def forget_uploads(self, uploads: Sequence[Upload]) -> None:
        """These are no more. Their content is for the caller to remove."""
        query = "DELETE FROM upload WHERE tenant = ? AND folder = ? AND subfolder = ? AND name = ? AND sha256 = ?"
        rows = [(up.tenant, up.folder, up.subfolder, up.name, up.sha256) for up in uploads]
        await self.do(lambda db: db.executemany(query, rows) and None)

    def content(self, digest: str) -> Path:
        """Where the content of a file lies."""
        return self._folder / "files" / digest

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run it on the thread of the database, in a transaction that it shares with others. Raises StoreError."""
        if self._lane is None:
            raise StoreError("the store of jobs is closed; open it first")
        return await self._lane.do(work)

    def _connect(self) -> sqlite3.Connection:
        return connected(self._folder / "jobs.db")


_SELECT = "SELECT body, state, server, attempts, started_s, ended_s, history FROM job"


def _without_secrets(db: sqlite3.Connection, prompt_id: str) -> None:
    """Keys for paid services are of no use to a job that has ended."""
    found = db.execute("SELECT body FROM job WHERE prompt_id = ?", (prompt_id,)).fetchone()
    job = None if found is None else msgspec.json.decode(found[0], type=Job)
    if job is not None and job.extra != job.shared_extra:
        body = msgspec.json.encode(msgspec.structs.replace(job, extra=job.shared_extra))
        db.execute("UPDATE job SET body = ? WHERE prompt_id = ?", (body, prompt_id))


def _decided(db: sqlite3.Connection, prompt_id: str, attempt: int | None, decision: Decision) -> None:
    """Keep a decision as that of an attempt, or as the next one."""
    if attempt is None:
        query = "SELECT coalesce(max(attempt), 0) + 1 FROM decision WHERE prompt_id = ?"
        attempt = db.execute(query, (prompt_id,)).fetchone()[0]
    db.execute("INSERT OR REPLACE INTO decision VALUES (?, ?, ?)", (prompt_id, attempt, msgspec.json.encode(decision)))


def _prune(db: sqlite3.Connection, keep: int) -> None:
    """Forget the oldest ended jobs beyond `keep`."""
    query = "SELECT seq FROM job WHERE ended_s IS NOT NULL AND seq > 0 ORDER BY seq DESC LIMIT 1 OFFSET ?"
    surplus = db.execute(query, (keep,)).fetchone()
    if surplus is not None:
        _forget(db, "ended_s IS NOT NULL AND seq > 0 AND seq <= ?", surplus)


def _forget(db: sqlite3.Connection, where: str, values: Sequence[object]) -> None:
    """These jobs are no more, nor is why they went where they went."""
    db.execute(f"DELETE FROM decision WHERE prompt_id IN (SELECT prompt_id FROM job WHERE {where})", values)  # noqa: S608
    db.execute(f"DELETE FROM job WHERE {where}", values)  # noqa: S608


def _workflow_of(body: bytes) -> str | None:
    return workflow_in(msgspec.json.decode(body, type=_Sent).extra)


def _read(row: tuple[Any, ...]) -> StoredJob:
    body, state, server, attempts, started_s, ended_s, history = row
    return StoredJob(
        job=msgspec.json.decode(body, type=Job),
        state=state,
        server=server,
        attempts=attempts,
        started_s=started_s,
        ended_s=ended_s,
        history=history,
    )


def digest_of(data: bytes) -> str:
    """The name of a content."""
    return sha256(data).hexdigest()

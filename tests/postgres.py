"""A real PostgreSQL server of the tests' own: one a session, on a socket in a folder of its own, a database a test."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg

_ADMIN = "postgres"


def missing() -> str | None:
    """Why no server can be started here, None where it can."""
    if programs() is None:
        return "there is no PostgreSQL server here (apt-get install postgresql)"
    if os.geteuid() == 0 and _account() is None:
        return "PostgreSQL refuses to run as root, and there is no user 'postgres' here"
    return None


def programs() -> Path | None:
    """The folder of initdb and pg_ctl."""
    found = shutil.which("pg_ctl")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    candidates = [*folders, *([Path(found).resolve().parent] if found else [])]
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


class PostgresServer:
    """`start`, `stop` and `start` again keep what is stored; `remove` does not. No disk is waited for."""

    def __init__(self) -> None:
        found = programs()
        assert found is not None, missing()
        self._programs = found
        self._as: dict[str, Any] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="swarmx-pg-"))
        account = _account()
        if os.geteuid() == 0 and account is not None:
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self.folder.chmod(0o755)
        self._run("initdb", "-D", "data", "-U", _ADMIN, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")

    def start(self, *, options: str = "") -> None:
        settings = f"-c listen_addresses= -k {self.folder} -c fsync=off -c shared_buffers=32MB {options}"
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", settings, "start")

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash: connections break, and the next start recovers."""
        self._run("pg_ctl", "-D", "data", "-w", "-m", mode, "stop")

    def remove(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://{_ADMIN}@/{database}?host={self.folder}"

    async def new_database(self) -> str:
        """The URL of a database that nobody has used."""
        name = f"t{uuid4().hex}"
        await self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    async def drop(self, url: str) -> None:
        await self.sql(f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")

    async def sql(self, statement: str, *values: object, url: str | None = None) -> list[Any]:
        """Run one statement as the administrator."""
        connection = await asyncpg.connect(url or self.url(_ADMIN))
        try:
            return list(await connection.fetch(statement, *values))
        finally:
            await connection.close()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        # The server outlives pg_ctl: a pipe would be open for as long.
        with (self.folder / "commands.log").open("a") as said:
            done = subprocess.run(command, cwd=self.folder, stdout=said, stderr=said, check=False, **self._as)
        assert done.returncode == 0, f"{command} failed: {(self.folder / 'commands.log').read_text()[-2000:]}"

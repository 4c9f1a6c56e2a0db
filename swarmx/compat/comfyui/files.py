"""Names of files: uploads are kept by content and copied to the server that needs them, outputs say whose they are.

Two servers both make `picture_00001_.png`: what clients see is `server~picture_00001_.png`, which `/view`, and a graph
that loads it, can be given back.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from swarmx.compat.comfyui.graph import PREFIX, Graph, file_name, names_file, with_inputs
from swarmx.compat.comfyui.jobs import File, Job
from swarmx.compat.comfyui.server import ComfyServer, FileAway, ServerAway
from swarmx.compat.comfyui.settings import TenantSettings
from swarmx.compat.comfyui.store import JobStore, Upload, digest_of

MARK = "~"
"""How the names of copied files begin at servers."""
FOLDERS = ("input", "output", "temp")
_FRESH = 10_000
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\:*?\"<>|]{1,200}")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,12}")


class BadName(Exception):
    """A name of a file or folder that cannot be one."""


class QuotaFull(Exception):
    """The tenant has uploaded as much as it may; with `never`, the file alone is more than that."""

    def __init__(self, detail: str, *, never: bool) -> None:
        super().__init__(detail)
        self.never = never


class Files:
    """The uploads of all tenants, and which server has a copy of which content."""

    def __init__(
        self, store: JobStore, servers: Mapping[str, ComfyServer], owed: Callable[[str], TenantSettings]
    ) -> None:
        self._store = store
        self._servers = servers
        self._owed = owed
        self._sizes: dict[str, int] = {}  # of contents, by hash
        self._kept: Counter[str] = Counter()  # files by tenant
        self._kept_bytes: Counter[str] = Counter()
        self._uploads: dict[tuple[str, str, str], Upload] = {}  # by tenant, folder and path
        self._keeping = asyncio.Lock()  # two uploads of one name at a time: the second gets a number
        self._copied: dict[str, set[str]] = {}
        self._fresh: dict[File, str] = {}  # outputs of jobs that still run: whose they are

    async def open(self) -> None:
        """Read what was uploaded before."""
        for upload in await self._store.uploads():
            path = self._store.content(upload.sha256)
            self._sizes[upload.sha256] = path.stat().st_size if path.exists() else 0
            self._put(upload)

    async def keep(
        self, tenant: str, folder: str, subfolder: str, name: str, data: bytes, *, overwrite: bool
    ) -> Upload:
        """Keep an upload. A name that is taken by another content gets a number, as on a ComfyUI server.

        Raises BadName, QuotaFull, StoreError.
        """
        if folder not in FOLDERS:
            raise BadName(f"the type of a file is one of {', '.join(FOLDERS)}, not {folder!r}")
        subfolder = _subfolder(subfolder)
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise BadName(f"a file cannot be called {name[:200]!r}")
        if self.owner_of(name) is not None:
            raise BadName(f"{name[:200]!r} is what a file is called that a server made; upload it under another name")
        digest = await asyncio.to_thread(digest_of, data)
        stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
        count, wanted = 0, name
        async with self._keeping:
            while True:
                upload = Upload(tenant=tenant, folder=folder, subfolder=subfolder, name=wanted, sha256=digest)
                known = self._uploads.get((tenant, folder, upload.path))
                if known is None or overwrite or known.sha256 == digest:
                    break
                count += 1
                wanted = f"{stem} ({count}){suffix}"
            self._check_room(tenant, known, len(data))
            await self._store.keep_upload(upload, data)
            await asyncio.to_thread(os.utime, self._store.content(digest))  # it may have been there for long
            self._sizes[digest] = len(data)
            self._put(upload)
        return upload

    async def forget(self, before_s: float) -> None:
        """Uploads whose content nobody has kept or used since then (Unix seconds) are no more."""
        async with self._keeping:
            used_s = await asyncio.to_thread(self._used_s)
            gone = [upload for upload in self._uploads.values() if used_s.get(upload.sha256, 0.0) < before_s]
            if not gone:
                return
            await self._store.forget_uploads(gone)
            for upload in gone:
                self._take(upload)
            left = {upload.sha256 for upload in self._uploads.values()}
            for digest in {upload.sha256 for upload in gone} - left:
                del self._sizes[digest]
                await asyncio.to_thread(self._store.content(digest).unlink, missing_ok=True)

    def _check_room(self, tenant: str, known: Upload | None, size: int) -> None:
        """Whether a file may be kept, in the place of the known one. Raises QuotaFull."""
        owed = self._owed(tenant)
        if size > owed.max_uploaded_bytes:
            detail = f"the file has {size} bytes, all uploads together may have {owed.max_uploaded_bytes}"
            raise QuotaFull(detail, never=True)
        files = self._kept[tenant] + (known is None)
        total = self._kept_bytes[tenant] + size - (0 if known is None else self._sizes[known.sha256])
        if files > owed.max_uploads or total > owed.max_uploaded_bytes:
            detail = f"it would be {files} files of {owed.max_uploads}, {total} bytes of {owed.max_uploaded_bytes}"
            raise QuotaFull(detail, never=False)

    def _put(self, upload: Upload) -> None:
        before = self._uploads.get((upload.tenant, upload.folder, upload.path))
        if before is not None:
            self._take(before)
        self._uploads[upload.tenant, upload.folder, upload.path] = upload
        self._kept[upload.tenant] += 1
        self._kept_bytes[upload.tenant] += self._sizes[upload.sha256]

    def _take(self, upload: Upload) -> None:
        del self._uploads[upload.tenant, upload.folder, upload.path]
        self._kept[upload.tenant] -= 1
        self._kept_bytes[upload.tenant] -= self._sizes[upload.sha256]

    def _used_s(self) -> dict[str, float]:
        """When each content was kept or used last: the time of its file."""
        paths = {digest: self._store.content(digest) for digest in list(self._sizes)}
        return {digest: path.stat().st_mtime for digest, path in paths.items() if path.exists()}

    def names(self, tenant: str) -> NamesOf:
        """The files that a graph of the tenant may name."""
        return NamesOf(self, tenant)

    def find(self, tenant: str, folder: str, path: str) -> Upload | None:
        """One upload of the tenant."""
        return self._uploads.get((tenant, folder, path))

    def owner_of(self, name: str) -> tuple[str, str] | None:
        """The server of an output, and its name there; None for what no server of ours made."""
        *folders, last = name.split("/")
        server, mark, rest = last.partition(MARK)
        return (server, "/".join([*folders, rest])) if mark and rest and server in self._servers else None

    def made(self, tenant: str, outputs: Iterable[File]) -> None:
        """A job that still runs has made these files: its client may fetch them at once."""
        for output in outputs:
            self._fresh[output] = tenant
        while len(self._fresh) > _FRESH:
            del self._fresh[next(iter(self._fresh))]

    def stored(self, outputs: Iterable[File]) -> None:
        """The store knows now whose these are."""
        for output in outputs:
            self._fresh.pop(output, None)

    async def may_see(self, tenant: str | None, folder: str, subfolder: str, name: str) -> bool:
        """Whether an output is the tenant's (None: whether anybody may ask)."""
        if tenant is None or self._fresh.get((folder, subfolder, name)) == tenant:
            return True
        return await self._store.made(tenant, folder, subfolder, name)

    async def may_load(self, tenant: str, value: str) -> bool:
        """Whether a graph of the tenant may name the file: an upload of its own, or an output of its jobs."""
        path, folder = file_name(value)
        owner = self.owner_of(path)
        if owner is None:
            return True
        subfolder, _, name = path.rpartition("/")
        return await self.may_see(tenant, _made_in(folder), subfolder, name)

    def restarted(self, server: str) -> None:
        """The server may have lost its copies."""
        self._copied.pop(server, None)

    async def localised(self, job: Job, server: ComfyServer) -> Graph:
        """The graph as the server needs it, with all files that it names there. Raises ServerAway."""
        changes: dict[tuple[str, str], object] = {}
        for node_id, name in job.files:
            value = str(job.graph[node_id]["inputs"][name])
            path, folder = file_name(value)
            owner = self.owner_of(path)
            if owner is not None and owner[0] == server.name:
                changes[node_id, name] = f"{owner[1]} [{_made_in(folder)}]"
                continue
            data = await self.content(job.tenant, folder, path)
            if data is not None:  # else it was deleted: the server says so in its own words
                changes[node_id, name] = await self.copy(server, path, data)
        return with_inputs(job.graph, changes)

    async def masked(self, tenant: str, folder: str, path: str, mask: bytes, server: ComfyServer) -> bytes:
        """A picture of the tenant with the transparency of another one, as the server paints it.

        Raises BadName where there is no such picture, or the server cannot read one of them; ServerAway.
        """
        seen = await self.may_load(tenant, f"{path} [{folder}]")
        picture = await self.content(tenant, folder, path) if seen else None
        if picture is None:
            raise BadName(f"there is no picture {path[:200]!r} to paint the mask into")
        name = f"{PREFIX}{digest_of(picture + mask)[:32]}.png"
        painted = await server.masked(await self.copy(server, path, picture), mask, name)
        if painted is None:
            raise BadName(f"the server cannot paint the mask into {path[:200]!r}")
        return painted

    async def content(self, tenant: str, folder: str, path: str) -> bytes | None:
        """What is in an output of a server, or an upload; None where that is not there. Raises ServerAway."""
        owner = self.owner_of(path)
        if owner is not None:
            return await self._fetch(self._servers[owner[0]], owner[1], _made_in(folder))
        upload = self.find(tenant, folder, path)
        return None if upload is None else await asyncio.to_thread(_read, self._store.content(upload.sha256))

    async def copy(self, server: ComfyServer, path: str, data: bytes) -> str:
        """Put the content onto the server under a name that is the same for the same content."""
        suffix = PurePosixPath(path).suffix
        name = f"{PREFIX}{(await asyncio.to_thread(digest_of, data))[:32]}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
        copied = self._copied.setdefault(server.name, set())
        if name not in copied:
            await server.upload(name, data)
            copied.add(name)
        return name

    async def _fetch(self, server: ComfyServer, path: str, folder: str) -> bytes:
        subfolder, _, name = path.rpartition("/")
        query = {"filename": name, "subfolder": subfolder, "type": folder}
        try:
            async with server.view(query, {}) as response:
                if response.status == 200:
                    return await response.read()
        except ServerAway as away:
            detail = f"{server.name} cannot be asked for its file {path!r}: {away}"
            raise FileAway(detail, owner=server.name, refused=away.refused) from None
        gone = response.status == 404
        detail = "has it no more" if gone else f"answers with status {response.status}"
        raise FileAway(f"{server.name}, which made the file {path!r}, {detail}", owner=server.name, gone=gone)


class NamesOf:
    """A collection of names for `in`: the uploads of one tenant, and outputs of the servers."""

    def __init__(self, files: Files, tenant: str) -> None:
        self._files = files
        self._tenant = tenant

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        known = any(self._files.find(self._tenant, folder, name) is not None for folder in FOLDERS)
        return known or self._files.owner_of(name) is not None

    def __iter__(self) -> Iterator[str]:
        raise TypeError("names can be looked up only")

    def __len__(self) -> int:
        raise TypeError("names can be looked up only")


def tagged(server: str, output: Any) -> Any:
    """An output of a node with every file in it named as the server's."""
    if isinstance(output, dict):
        row = {key: tagged(server, value) for key, value in output.items()}
        if names_file(row):
            row["filename"] = f"{server}{MARK}{row['filename']}"
        return row
    return [tagged(server, value) for value in output] if isinstance(output, list) else output


def files_in(output: Any) -> Iterator[File]:
    """Every file in an output."""
    if isinstance(output, dict):
        if names_file(output):
            yield str(output["type"]), str(output.get("subfolder", "")), output["filename"]
        for value in output.values():
            yield from files_in(value)
    elif isinstance(output, list):
        for value in output:
            yield from files_in(value)


def _read(path: Path) -> bytes | None:
    """The content of an upload, which has been used by that; None where it has just been forgotten."""
    try:
        os.utime(path)
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _made_in(folder: str) -> str:
    """Where an output lies that a graph names; by its bare name it is one of the output folder."""
    return "output" if folder == "input" else folder


def _subfolder(raw: str) -> str:
    parts = [part for part in raw.replace("\\", "/").split("/") if part not in ("", ".")]
    if any(not _NAME.fullmatch(part) or part == ".." for part in parts) or len(parts) > 8:
        raise BadName(f"a folder cannot be called {raw[:200]!r}")
    return "/".join(parts)

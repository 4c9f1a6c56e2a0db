"""The routes for files: `/upload/image`, `/upload/mask` and `/view`."""

from __future__ import annotations

import asyncio
import mimetypes
import re

import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from swarmx.compat.comfyui.answers import refusal
from swarmx.compat.comfyui.auth import KEY, require
from swarmx.compat.comfyui.files import BadName, Files, QuotaFull
from swarmx.compat.comfyui.graph import file_name
from swarmx.compat.comfyui.server import ServerAway
from swarmx.compat.comfyui.servers import Servers
from swarmx.compat.comfyui.store import JobStore
from swarmx.compat.comfyui.validation import error

_PASSED_ON = ("Range", "If-Range", "If-None-Match", "If-Modified-Since")
_PASSED_BACK = ("Content-Type", "Content-Length", "Content-Range", "Accept-Ranges", "Content-Disposition", "ETag")
_SHOWN = re.compile(r"(image|audio|video|model)/(?!svg)[a-z0-9.+-]+|text/plain|application/json")
_GUARDS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}
_LONGEST_FIELD, _MOST_FIELDS = 4096, 16


class FileRoutes:
    """Uploads stay here; outputs come from the server that made them, to the tenant whose job did."""

    def __init__(self, *, files: Files, store: JobStore, servers: Servers, max_upload_bytes: int) -> None:
        self._files = files
        self._store = store
        self._servers = servers
        self._max_upload_bytes = max_upload_bytes

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/upload/image", self.upload),
            web.post("/upload/mask", self.mask),
            web.get("/view", self.view),
        ]

    async def upload(self, request: web.Request) -> web.Response:
        key = require(request, "submit")
        fields, name, data = await self._form(request)
        return await self._kept(key.tenant, fields, name, data)

    async def mask(self, request: web.Request) -> web.Response:
        """A server's own code paints the mask into the picture `original_ref`; the outcome is kept as an upload."""
        key = require(request, "submit")
        fields, name, data = await self._form(request)
        up = self._some_server()
        try:
            folder, path = _reference(fields.get("original_ref", ""))
            painted = await self._files.masked(key.tenant, folder, path, data, self._servers[up])
        except BadName as bad:
            raise web.HTTPBadRequest(text=str(bad)) from None
        except ServerAway as away:
            raise web.HTTPBadGateway(text=f"the mask could not be painted: {away}") from None
        return await self._kept(key.tenant, fields, name, painted)

    def _some_server(self) -> str:
        """One that is up. Raises HTTPServiceUnavailable."""
        up = next((server for server in self._servers if self._servers.is_up(server)), None)
        if up is None:
            text = "this takes a server, and none is up; try again later"
            raise web.HTTPServiceUnavailable(text=text, headers={"Retry-After": "5"})
        return up

    async def _kept(self, tenant: str, fields: dict[str, str], name: str, data: bytes) -> web.Response:
        try:
            upload = await self._files.keep(
                tenant,
                fields.get("type") or "input",
                fields.get("subfolder", ""),
                name,
                data,
                overwrite=fields.get("overwrite", "").lower() in ("1", "true"),
            )
        except BadName as bad:
            raise web.HTTPBadRequest(text=str(bad)) from None
        except QuotaFull as full:
            if full.never:
                return refusal(413, error("file_too_large", "the file is larger than all uploads may be", str(full)))
            return refusal(429, error("upload_quota", "the files of earlier uploads fill the quota", str(full)))
        return web.json_response({"name": upload.name, "subfolder": upload.subfolder, "type": upload.folder})

    async def view(self, request: web.Request) -> web.StreamResponse:
        require(request, "read")
        query = {key: value for key, value in request.query.items() if key != "token"}
        name, folder, subfolder = query.get("filename", ""), query.get("type", "output"), query.get("subfolder", "")
        if not name or ".." in f"{subfolder}/{name}".split("/") or name.startswith("/"):
            raise web.HTTPBadRequest(text="filename is the name of a file")
        path = f"{subfolder}/{name}" if subfolder else name
        owner = self._files.owner_of(path)
        if owner is None:
            return await self._uploaded(request, folder, path, query)
        *folders, _ = path.split("/")
        if not await self._files.may_see(request[KEY].sees, folder, "/".join(folders), path.rpartition("/")[2]):
            raise web.HTTPNotFound
        query |= {"filename": owner[1].rpartition("/")[2], "subfolder": owner[1].rpartition("/")[0], "type": folder}
        return await self._relay(request, owner[0], query)

    async def _uploaded(
        self, request: web.Request, folder: str, path: str, query: dict[str, str]
    ) -> web.StreamResponse:
        """An upload as it is; in another format, or some of its channels, as a server makes that of a copy."""
        upload = self._files.find(request[KEY].tenant, folder, path)
        if upload is None:
            raise web.HTTPNotFound
        if "preview" in query or query.get("channel") in ("a", "rgb"):
            up, data = self._some_server(), await self._files.content(request[KEY].tenant, folder, path)
            if data is None:
                raise web.HTTPNotFound
            try:
                copy = await self._files.copy(self._servers[up], path, data)
            except ServerAway as away:
                raise web.HTTPBadGateway(text=f"{path[:200]!r} could not be converted: {away}") from None
            return await self._relay(request, up, query | {"filename": copy, "subfolder": "", "type": "input"})
        kind = mimetypes.guess_type(upload.name)[0] or "application/octet-stream"
        headers = {"Content-Type": _harmless(kind), **_GUARDS}
        return web.FileResponse(self._store.content(upload.sha256), headers=headers)

    async def _relay(self, request: web.Request, server: str, query: dict[str, str]) -> web.StreamResponse:
        passed = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        response: web.StreamResponse | None = None
        try:
            async with self._servers[server].view(query, passed) as found:
                response = web.StreamResponse(status=found.status)
                for name in _PASSED_BACK:
                    if name in found.headers:
                        response.headers[name] = found.headers[name]
                response.headers["Content-Type"] = _harmless(found.headers.get("Content-Type", ""))
                response.headers.update(_GUARDS)
                await response.prepare(request)
                if request.method != "HEAD":
                    async for chunk in found.content.iter_chunked(1 << 16):
                        await response.write(chunk)
                await response.write_eof()
                return response
        except ServerAway as away:
            if response is not None and response.prepared:
                raise ConnectionResetError(str(away)) from None  # what was sent cannot be taken back
            raise web.HTTPBadGateway(text=f"the server that has the file does not answer: {server}") from None

    async def _form(self, request: web.Request) -> tuple[dict[str, str], str, bytes]:
        """The text fields, and the name and content of the file. Raises HTTPBadRequest, HTTPRequestEntityTooLarge."""
        fields: dict[str, str] = {}
        name, data = None, bytearray()
        try:
            reader = await request.multipart()
            while (part := await reader.next()) is not None:
                if not isinstance(part, BodyPartReader):
                    raise ValueError("a form in a form")
                if len(fields) >= _MOST_FIELDS:
                    raise ValueError(f"more than {_MOST_FIELDS} fields")
                limit = self._max_upload_bytes if part.name == "image" else _LONGEST_FIELD
                body = bytearray()
                while chunk := await part.read_chunk(1 << 16):
                    body += chunk
                    if len(body) > limit:
                        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(body))
                if part.name == "image" and part.filename:
                    name, data = part.filename, body
                elif part.name:
                    fields[part.name] = body.decode(errors="replace")
        except (ValueError, AssertionError, RuntimeError, asyncio.IncompleteReadError, HttpProcessingError) as error:
            raise web.HTTPBadRequest(text=f"this is not a form with a file: {error}") from None
        if name is None:
            raise web.HTTPBadRequest(text="the form has no file in its field `image`")
        return fields, name, bytes(data)


def _harmless(content_type: str) -> str:
    """A browser saves what it might otherwise run."""
    kind = content_type.partition(";")[0].strip().lower()
    return content_type if _SHOWN.fullmatch(kind) else "application/octet-stream"


def _reference(raw: str) -> tuple[str, str]:
    """Folder and path of the picture that a mask is for. Raises BadName."""
    try:
        wanted = msgspec.json.decode(raw, type=_Reference)
    except msgspec.MsgspecError as error:
        raise BadName(f"original_ref names no picture: {error}") from None
    name, folder = file_name(wanted.filename)
    return (
        folder if name != wanted.filename else wanted.type,
        f"{wanted.subfolder}/{name}" if wanted.subfolder else name,
    )


class _Reference(msgspec.Struct):
    filename: str
    subfolder: str = ""
    type: str = "output"

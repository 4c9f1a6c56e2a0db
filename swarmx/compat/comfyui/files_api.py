"""The routes for files: `/upload/image`, `/upload/mask` and `/view`."""

from __future__ import annotations

import asyncio
import mimetypes

from aiohttp import BodyPartReader, web

from swarmx.compat.comfyui.auth import KEY, require
from swarmx.compat.comfyui.files import BadName, Files
from swarmx.compat.comfyui.server import ServerAway
from swarmx.compat.comfyui.servers import Servers
from swarmx.compat.comfyui.store import JobStore

_PASSED_ON = ("Range", "If-Range", "If-None-Match", "If-Modified-Since")
_PASSED_BACK = ("Content-Type", "Content-Length", "Content-Range", "Accept-Ranges", "Content-Disposition", "ETag")
_WOULD_RUN = {"text/html", "text/javascript", "text/css", "application/xhtml+xml", "image/svg+xml", "application/xml"}
_LONGEST_FIELD = 4096


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
        if name is None:
            raise web.HTTPBadRequest(text="the form has no file in its field `image`")
        try:
            upload = await self._files.keep(
                key.tenant,
                fields.get("type") or "input",
                fields.get("subfolder", ""),
                name,
                data,
                overwrite=fields.get("overwrite", "").lower() in ("1", "true"),
            )
        except BadName as bad:
            raise web.HTTPBadRequest(text=str(bad)) from None
        return web.json_response({"name": upload.name, "subfolder": upload.subfolder, "type": upload.folder})

    async def mask(self, request: web.Request) -> web.Response:
        """Masks are painted into pictures by the servers' own code, which the front does not have."""
        require(request, "submit")
        raise web.HTTPNotImplemented(text="upload the picture with its mask as one file, with /upload/image")

    async def view(self, request: web.Request) -> web.StreamResponse:
        require(request, "read")
        query = {key: value for key, value in request.query.items() if key != "token"}
        name, folder, subfolder = query.get("filename", ""), query.get("type", "output"), query.get("subfolder", "")
        if not name or ".." in f"{subfolder}/{name}".split("/") or name.startswith("/"):
            raise web.HTTPBadRequest(text="filename is the name of a file")
        path = f"{subfolder}/{name}" if subfolder else name
        owner = self._files.owner_of(path)
        if owner is None:
            return await self._uploaded(request, folder, path)
        *folders, _ = path.split("/")
        if not await self._files.may_see(request[KEY].sees, folder, "/".join(folders), path.rpartition("/")[2]):
            raise web.HTTPNotFound
        query |= {"filename": owner[1].rpartition("/")[2], "subfolder": owner[1].rpartition("/")[0], "type": folder}
        return await self._relay(request, owner[0], query)

    async def _uploaded(self, request: web.Request, folder: str, path: str) -> web.StreamResponse:
        upload = self._files.find(request[KEY].tenant, folder, path)
        if upload is None:
            raise web.HTTPNotFound
        kind = mimetypes.guess_type(upload.name)[0] or "application/octet-stream"
        headers = {"Content-Type": _harmless(kind), "X-Content-Type-Options": "nosniff"}
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
                response.headers["X-Content-Type-Options"] = "nosniff"
                await response.prepare(request)
                async for chunk in found.content.iter_chunked(1 << 16):
                    await response.write(chunk)
                await response.write_eof()
                return response
        except ServerAway as away:
            if response is not None and response.prepared:
                raise ConnectionResetError(str(away)) from None  # what was sent cannot be taken back
            raise web.HTTPBadGateway(text=f"the server that has the file does not answer: {server}") from None

    async def _form(self, request: web.Request) -> tuple[dict[str, str], str | None, bytes]:
        """The text fields, and the name and content of the file. Raises HTTPBadRequest, HTTPRequestEntityTooLarge."""
        fields: dict[str, str] = {}
        name, data = None, bytearray()
        try:
            reader = await request.multipart()
            while (part := await reader.next()) is not None:
                if not isinstance(part, BodyPartReader):
                    raise ValueError("a form in a form")
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
        except (ValueError, AssertionError, RuntimeError, asyncio.IncompleteReadError) as error:
            raise web.HTTPBadRequest(text=f"this is not a form with a file: {error}") from None
        return fields, name, bytes(data)


def _harmless(content_type: str) -> str:
    """A browser saves what it would otherwise run."""
    kind = content_type.partition(";")[0].strip().lower()
    return "application/octet-stream" if kind in _WOULD_RUN or not kind else content_type

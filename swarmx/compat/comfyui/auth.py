"""Who asks: a bearer token of SwarmX's keys, in the places where ComfyUI's clients can put one."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from swarmx.config import is_loopback
from swarmx.core.errors import Forbidden, Unauthorized, Unavailable
from swarmx.gateway.keys import Key, Keyring

KEY = web.RequestKey("key", Key)
OPEN = Key(name="anybody", role="operator", tenant="default", sha256="")
"""Who asks where no key is needed."""

_LOOK_EVERY_S = 1.0
_FOR_PROBES = frozenset({"/healthz", "/readyz"})
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def token_of(request: web.Request) -> str | None:
    """The `Authorization` header; the password of Basic credentials, for clients that are given a URL only; or the
    parameter `token`, for websockets."""
    header = request.headers.get("Authorization")
    if header is None:
        token = request.query.get("token")
        return f"Bearer {token}" if token else None
    scheme, _, rest = header.partition(" ")
    if scheme.lower() != "basic":
        return header
    try:
        _, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
    except ValueError:
        raise Unauthorized("the Basic credentials cannot be read. Use the token as the password.") from None
    return f"Bearer {password}"


def from_elsewhere(request: web.Request, *, open_front: bool) -> bool:
    """Whether a page of another site makes the browser ask; an open front also wants to be called by a local name."""
    origin = request.headers.get("Origin")
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        return True
    try:
        if open_front and not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
            return True
        return origin is not None and urlsplit(origin).netloc != request.host
    except ValueError:  # neither is an address
        return True


def guard(keys: Keyring | None) -> Middleware:
    """Middleware that lets nobody in without a key, but to the probes; None: everybody is `OPEN`."""

    @web.middleware
    async def checked(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.path in _FOR_PROBES:
            return await handler(request)
        if from_elsewhere(request, open_front=keys is None):
            raise Forbidden(f"{request.headers.get('Origin') or request.host} may not ask here: it is another site.")
        request[KEY] = OPEN if keys is None else keys.check(token_of(request))
        return await handler(request)

    return checked


@asynccontextmanager
async def hung_up_on(request: web.Request, keys: Keyring | None) -> AsyncIterator[None]:
    """Inside the block, which may last, the connection breaks off once the key of the request is none any more."""
    task = None if keys is None else asyncio.create_task(_watch(request, keys), name="comfyui key")
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


async def _watch(request: web.Request, keys: Keyring) -> None:
    token = token_of(request)
    while request.transport is not None:
        try:
            valid = keys.check(token) == request[KEY]  # it may have another role by now
        except Unauthorized:
            valid = False
        except Unavailable:  # who may ask is not known now; those who are in stay in
            valid = True
        if not valid:
            request.transport.abort()
            return
        await asyncio.sleep(_LOOK_EVERY_S)


def require(request: web.Request, right: str) -> Key:
    """The key of the request, if its role has the right. Raises Forbidden."""
    key = request[KEY]
    key.require(right)  # type: ignore[arg-type]  # one of the words of `keys.Right`
    return key

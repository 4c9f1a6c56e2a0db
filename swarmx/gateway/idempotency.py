"""Idempotency-Key: a request that comes again with the same key is carried out once, and answered alike."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256

import msgspec
from starlette.requests import Request

from swarmx.core import failpoints
from swarmx.core.errors import Refused
from swarmx.core.ports import Store
from swarmx.core.records import Idempotency
from swarmx.gateway.keys import Key
from swarmx.runtime.clock import Clock
from swarmx.runtime.requests import BadRequest

LIFETIME_S = 24 * 3600.0
HEADER, REPLAYED = "idempotency-key", "idempotency-replayed"
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')  # a string of RFC 8941
_KEY = re.compile(r"[\x20-\x7e]{1,255}")


class Keys:
    """The keys of requests. What they brought is in the store; which are being carried out now, only here."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._in_flight: set[tuple[str, str]] = set()

    @contextmanager
    def of(self, request: Request, body: bytes, key: Key) -> Iterator[Idempotency | None]:
        """What the store is to remember of the request, None without a key; in the block no other may have it.

        Raises BadRequest for a header that is no key, Refused while a request with it is being carried out.
        """
        name = _name(request)
        if name is None:
            yield None
            return
        place = (key.tenant, name)
        if place in self._in_flight:
            raise Refused(
                f"a request with the idempotency key {name[:80]!r} is being carried out; ask again in a second",
                rule="in_flight",
            )
        self._in_flight.add(place)
        try:
            yield Idempotency(
                key=name,
                fingerprint=_fingerprint(request, body, key.tenant),
                expires_at_s=self._clock.now_s() + LIFETIME_S,
                tenant=key.tenant,
            )
        finally:
            self._in_flight.discard(place)

    async def once(
        self, idempotency: Idempotency | None, key: Key, workflow_id: str, work: Callable[[], Awaitable[object]]
    ) -> bool:
        """Do the work on the workflow unless the key says that it is done; whether it was. Raises KeyReused.

        A crash may come between the work and its note, so the work must do no harm a second time.
        """
        if idempotency is None:
            await work()
            return False
        if await self._store.of_key(key.tenant, idempotency) is not None:
            return True
        await work()
        failpoints.hit("keys.done")
        await self._store.keep_key(key.tenant, idempotency, workflow_id)
        return False


def _name(request: Request) -> str | None:
    """The key in the header, bare or quoted. Raises BadRequest."""
    values = request.headers.getlist(HEADER)
    if not values:
        return None
    text = values[0].strip()
    if (quoted := _QUOTED.fullmatch(text)) is not None:
        text = re.sub(r"\\(.)", r"\1", quoted[1])
    if len(values) > 1 or not _KEY.fullmatch(text):
        raise BadRequest(
            f"Idempotency-Key {', '.join(values)[:40]!r}: one key of 1 to 255 printable ASCII characters was expected.",
            param=HEADER,
        )
    return text


def _fingerprint(request: Request, body: bytes, tenant: str) -> str:
    """The hash of what is asked for: the order and the layout of JSON do not count."""
    with suppress(msgspec.MsgspecError, UnicodeError, RecursionError):  # YAML, or nothing at all: the bytes themselves
        body = msgspec.json.encode(msgspec.json.decode(body), order="deterministic")
    asked = (request.method.encode(), request.url.path.encode("utf-8", "surrogateescape"), tenant.encode(), body)
    return sha256(b"\0".join(asked)).hexdigest()

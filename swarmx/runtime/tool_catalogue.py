"""What tools there are: those that the replicas say they have, and who may use them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import aiohttp
import msgspec

from swarmx.core.messages import Message, ReplicaChanged
from swarmx.core.nouns import Replica
from swarmx.core.toolbox import Offer, ToolSpec

log = logging.getLogger(__name__)

PATIENCE_S = 30.0
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_AGAIN_S = 1.0
_MOST_BYTES = 16 * 1024 * 1024


class ToolCatalogue:
    """The tools by name. Register `observe` with the switchboard, and have `run` running.

    Each replica that is ready is asked what it offers, and again every `every_s`. What the replicas of a pool offered
    last stays known while there is none of them, so that a pool may be scaled to nothing. Where two pools have a tool
    of one name, that of the first one by name counts.

    It is `settled` once all `pools`, those that the settings name, have offered something, or have had their time.
    """

    def __init__(
        self,
        pools: Collection[str] = (),
        *,
        token_of: Callable[[str], str | None] = lambda replica_id: None,
        every_s: float = 30.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._missing = set(pools)
        self._token_of = token_of
        self._every_s = every_s
        self._patience_s = patience_s
        self._ready: dict[str, Replica] = {}
        self._offers: dict[str, Offer] = {}  # by replica
        self._pools: dict[str, dict[str, ToolSpec]] = {}
        self._refused: dict[str, dict[str, str]] = {}
        self._tools: dict[str, ToolSpec] = {}
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        if not self._missing:
            self._settled.set()

    @property
    def refused(self) -> Mapping[str, Mapping[str, str]]:
        """Why tools that a pool should have are not there: by pool, then by their provider in it."""
        return self._refused

    @property
    def is_settled(self) -> bool:
        """Whether a tool that is not known here is not there."""
        return self._settled.is_set()

    async def settled(self) -> None:
        """Wait until it is."""
        await self._settled.wait()

    def of(self, tenant: str | None) -> dict[str, ToolSpec]:
        """The tools that a tenant may use, by name; all of them for None."""
        tools = self._tools
        if tenant is None or not any(spec.tenants for spec in tools.values()):
            return dict(tools)
        return {name: spec for name, spec in tools.items() if not spec.tenants or tenant in spec.tenants}

    def observe(self, message: Message, now_s: float) -> None:
        """Follow which replicas there are to ask."""
        if not isinstance(message, ReplicaChanged) or message.replica.kind != "tool":
            return
        replica = message.replica
        if message.state == "ready":
            self._ready[replica.replica_id] = replica
            self._changed.set()
        elif message.state == "gone":
            self._ready.pop(replica.replica_id, None)
            self._offers.pop(replica.replica_id, None)
            self._count(replica.model)

    async def run(self) -> None:
        """Ask the replicas until cancelled."""
        patience = asyncio.get_running_loop().call_later(self._patience_s, self._settled.set)
        try:
            async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
                while True:
                    self._changed.clear()
                    await asyncio.gather(*(self._ask(session, replica) for replica in list(self._ready.values())))
                    heard = self._ready.keys() <= self._offers.keys()
                    wait_s = self._every_s if heard else min(self._every_s, _AGAIN_S)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), wait_s)
        finally:
            patience.cancel()

    async def _ask(self, session: aiohttp.ClientSession, replica: Replica) -> None:
        token = self._token_of(replica.replica_id)
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        try:
            async with session.get(f"{replica.url}/v1/tools", headers=headers, allow_redirects=False) as response:
                if response.status != 200:
                    log.warning(
                        "tool replica %s does not tell its tools: status %s", replica.replica_id, response.status
                    )
                    return
                offer = msgspec.json.decode(await _whole(response), type=Offer)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            log.warning("tool replica %s does not tell its tools: %r", replica.replica_id, error)
            return
        if self._ready.get(replica.replica_id) is replica and self._offers.get(replica.replica_id) != offer:
            if offer.slots != replica.profile.max_batch:
                log.warning(
                    "tool replica %s runs %s calls at a time, the settings say %s",
                    replica.replica_id,
                    offer.slots,
                    replica.profile.max_batch,
                )
            self._offers[replica.replica_id] = offer
            self._count(replica.model)

    def _count(self, pool: str) -> None:
        """Put together what the pool has; while none of its replicas is there, that is what it had."""
        offers = [
            self._offers[name]
            for name, replica in self._ready.items()
            if replica.model == pool and name in self._offers
        ]
        if offers:
            tools = (spec for offer in offers for spec in offer.tools)
            self._pools[pool] = {spec.name: msgspec.structs.replace(spec, pool=pool) for spec in tools}
            had = self._pools[pool]
            self._refused[pool] = {
                provider: reason
                for offer in offers
                for provider, reason in offer.refused.items()
                if not any(name.startswith(f"{provider}.") for name in had)
            }
            self._missing.discard(pool)
        found: dict[str, ToolSpec] = {}
        for name in sorted(self._pools, reverse=True):
            found |= self._pools[name]
        self._tools = dict(sorted(found.items()))
        if not self._missing:
            self._settled.set()


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The body, of a bounded length. Raises ValueError."""
    body = await response.content.read(_MOST_BYTES)
    while chunk := await response.content.read(_MOST_BYTES):
        body += chunk
        if len(body) > _MOST_BYTES:
            raise ValueError(f"the answer has more than {_MOST_BYTES} bytes")
    return body

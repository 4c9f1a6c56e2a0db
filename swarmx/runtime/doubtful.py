"""Writes that the store reported as failed and that may be on disk: found out as soon as the store answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import chain, repeat

from swarmx.core.errors import StoreError

log = logging.getLogger(__name__)

RETRY_S = (0.1, 0.5, 2.0, 5.0)  # between attempts to use the store; the last one repeats


async def once_readable(look: Callable[[], Awaitable[object]]) -> None:
    """Look, again and again until the store can be read."""
    for pause_s in chain(RETRY_S, repeat(RETRY_S[-1])):
        try:
            await look()
            return
        except StoreError as error:
            log.warning("whether a write that failed is stored all the same is not known yet: %s", error)
            await asyncio.sleep(pause_s)

"""How long what has ended is kept: the store forgets the older rest, a little at a time, while the server works."""

from __future__ import annotations

import asyncio
import logging

from swarmx.core import failpoints
from swarmx.core.errors import StoreError
from swarmx.core.ports import Store
from swarmx.core.records import Forgotten

log = logging.getLogger(__name__)

DAY_S = 86_400.0
KEPT_CALLS = 10_000  # newest, whatever their age: as many as predictors learn from, and some
_AT_ONCE = 50
_PAUSE_S = 0.05  # between two parts others write
_FIRST_S = 10.0
_EVERY_S = 3600.0


async def keep_for(store: Store, keep_s: float, *, first_s: float = _FIRST_S, every_s: float = _EVERY_S) -> None:
    """Look for what ended more than `keep_s` ago, a while after the start and then each hour; cancel it to stop."""
    await asyncio.sleep(first_s)
    while True:
        try:
            await forget_older(store, keep_s)
        except StoreError as error:
            log.warning("the store could not forget what is old, trying again in %.0f s: %s", every_s, error)
        await asyncio.sleep(every_s)


async def forget_older(store: Store, keep_s: float, *, pause_s: float = _PAUSE_S) -> Forgotten:
    """Have the store forget all that ended more than `keep_s` ago; how much that was. Raises StoreError."""
    total = Forgotten()
    while gone := await store.forget(older_than_s=keep_s, kept_calls=KEPT_CALLS, limit=_AT_ONCE):
        failpoints.hit("retention.part")
        total = Forgotten(
            workflows=total.workflows + gone.workflows,
            calls=total.calls + gone.calls,
            decisions=total.decisions + gone.decisions,
        )
        await asyncio.sleep(pause_s)
    if total:
        log.info(
            "forgotten, as state.keep_days has it: %d workflows, %d calls, %d decisions without a call",
            total.workflows,
            total.calls,
            total.decisions,
        )
    return total

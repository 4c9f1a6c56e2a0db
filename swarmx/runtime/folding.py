"""Folds over the stored events of a workflow: few are folded at once, many in a thread, beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from swarmx.core.records import StoredEvent

T = TypeVar("T")

_FEW = 100  # events that are folded within a few milliseconds


async def folded(stored: Sequence[StoredEvent], fold: Callable[[Sequence[StoredEvent]], T]) -> T:
    """What `fold`, which depends on nothing that changes, makes of the events. Raises what that raises.

    A workflow has thousands of events: to fold them within the loop would hold up everybody else's calls.
    """
    return fold(stored) if len(stored) <= _FEW else await asyncio.to_thread(fold, stored)

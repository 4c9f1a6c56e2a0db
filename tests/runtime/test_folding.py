"""Folding the events of a large workflow does not hold up the loop."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from swarmx.core.errors import WorkflowError
from swarmx.core.records import StoredEvent
from swarmx.runtime.folding import folded


def where(stored: Sequence[StoredEvent]) -> tuple[int, int]:
    return len(stored), threading.get_ident()


def events(count: int) -> list[StoredEvent]:
    return [StoredEvent(seq=i + 1, at_s=0.0, body=b"{}") for i in range(count)]


async def test_few_events_are_folded_here_and_many_in_a_thread() -> None:
    assert await folded(events(10), where) == (10, threading.get_ident())
    count, thread = await folded(events(2000), where)
    assert count == 2000
    assert thread != threading.get_ident()


@pytest.mark.parametrize("count", [1, 2000])
async def test_an_error_of_the_fold_is_raised(count: int) -> None:
    def fails(stored: Sequence[StoredEvent]) -> None:
        raise WorkflowError(f"{len(stored)} events do not fit together")

    with pytest.raises(WorkflowError, match=f"{count} events"):
        await folded(events(count), fails)

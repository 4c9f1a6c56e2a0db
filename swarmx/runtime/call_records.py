"""Records of calls that no commit of a workflow carries, on their way to the store."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from swarmx.core.errors import StoreError
from swarmx.core.ports import Store
from swarmx.core.records import CallRecord

log = logging.getLogger(__name__)


class CallRecords:
    """Keeps them in their order. One that the store refuses is lost, and the log says so."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: deque[CallRecord] = deque()

    def add(self, records: Sequence[CallRecord]) -> None:
        self._waiting.extend(records)

    async def flush(self) -> None:
        """Store what waits. Cancelled in between, the next flush goes on; a record that comes twice counts once."""
        while self._waiting:
            record = self._waiting[0]
            try:
                await self._store.record_call(record)
            except StoreError as error:
                log.error("the record of call %s was lost: %s", record.call_id, error)
            if self._waiting and self._waiting[0] is record:
                self._waiting.popleft()

"""One place as a queue in order of arrival: from when calls are sent and end, how long each was worked on."""

from __future__ import annotations

from collections import OrderedDict


class Lane:
    """`slots` calls run at a time, the others wait in the order in which they were sent."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._running: dict[str, float] = {}  # since when
        self._waiting: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def sent(self, call_id: str, now_s: float) -> None:
        """A call is on its way there."""
        if len(self._running) < self.slots:
            self._running[call_id] = now_s
        else:
            self._waiting[call_id] = None

    def ended(self, call_id: str, now_s: float) -> float | None:
        """The call is over, and the next one runs; returns how long it was worked on, None for one that ended while it
        should have been waiting: then the order is not what it is taken for."""
        begun_s = self._running.pop(call_id, None)
        self._waiting.pop(call_id, None)
        if self._waiting and len(self._running) < self.slots:
            following, _ = self._waiting.popitem(last=False)
            self._running[following] = now_s
        return None if begun_s is None else max(0.0, now_s - begun_s)

    def drop_all(self) -> None:
        """The place is gone, with what it had."""
        self._running.clear()
        self._waiting.clear()

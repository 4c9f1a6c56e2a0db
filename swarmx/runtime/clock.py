"""The clock of the live shell."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where a shell reads the time."""

    def now_s(self) -> float:
        """Unix seconds; never runs backwards."""
        ...


class WallClock:
    """Unix time that a stepped system clock cannot turn back: read once, then carried on by the monotonic clock."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now_s(self) -> float:
        return time.monotonic() + self._offset_s

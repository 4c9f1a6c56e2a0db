"""The last routing decisions, for those who look at the page: a short memory that never grows."""

from __future__ import annotations

from collections import deque

from swarmx.core.messages import DecisionMade, Message
from swarmx.core.nouns import Decision


class RecentDecisions:
    """Observes the switchboard; keeps the last `limit` decisions."""

    def __init__(self, *, limit: int = 50) -> None:
        self._kept: deque[Decision] = deque(maxlen=limit)

    def observe(self, message: Message, now_s: float) -> None:
        if isinstance(message, DecisionMade):
            self._kept.append(message.decision)

    def newest(self, count: int) -> list[Decision]:
        """Newest first."""
        return [decision for _, decision in zip(range(count), reversed(self._kept), strict=False)]

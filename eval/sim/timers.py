"""The timers of one agent in virtual time: nearly all are stopped before they are due, so those far off stay cheap."""

from __future__ import annotations

from collections.abc import Callable

_WIDTH_S = 16.0


class Timers:
    """By key; `push(at_s, key)` puts one on the heap once it is due soon, `call_at(at_s, bucket)` asks for `open` then.

    A timer that is far off lies in a bucket of `_WIDTH_S` and leaves no trace when it is stopped.
    """

    def __init__(self, push: Callable[[float, str], None], call_at: Callable[[float, int], None]) -> None:
        self._push = push
        self._call_at = call_at
        self._at_s: dict[str, float] = {}
        self._buckets: dict[int, dict[str, None]] = {}

    def start(self, key: str, at_s: float, now_s: float) -> None:
        """Run out at `at_s`, not before now; a second timer with the same key replaces the first."""
        self.stop(key)
        at_s = max(at_s, now_s)
        self._at_s[key] = at_s
        number = int(at_s // _WIDTH_S)
        if number <= int(now_s // _WIDTH_S):
            self._push(at_s, key)
            return
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            self._call_at(number * _WIDTH_S, number)
        bucket[key] = None

    def stop(self, key: str) -> None:
        """Forget it."""
        at_s = self._at_s.pop(key, None)
        if at_s is not None and (bucket := self._buckets.get(int(at_s // _WIDTH_S))) is not None:
            bucket.pop(key, None)

    def open(self, number: int) -> None:
        """The time of the bucket has come."""
        for key in self._buckets.pop(number):
            self._push(self._at_s[key], key)

    def fires(self, key: str, at_s: float) -> bool:
        """Whether the timer that was pushed is still wanted; then it has run out."""
        if self._at_s.get(key) != at_s:
            return False
        del self._at_s[key]
        return True

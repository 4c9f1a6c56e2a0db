"""Hears when calls of Ray end, without fetching what they came to, and whether their actor was lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from swarmx.core.nouns import FailureReason

log = logging.getLogger(__name__)

_LOOK_S = 0.02  # in which a call that was just sent is not waited for yet
_MOST_AT_ONCE = 1000

Told = Callable[[FailureReason | None], None]


class Watching:
    """One thread for all calls of this process. `every_s` seconds, it also calls `look`."""

    def __init__(self, look: Callable[[], None], *, every_s: float) -> None:
        self._look = look
        self._every_s = every_s
        self._fresh: list[tuple[Any, Told]] = []
        self._wake = threading.Event()
        self._closed = False
        threading.Thread(target=self._run, name="swarmx calls", daemon=True).start()

    def add(self, ref: Any, told: Told) -> None:
        """Have `told` called, on the thread, once the call behind the reference has ended."""
        self._fresh.append((ref, told))
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        waiting: dict[Any, Told] = {}
        while not self._closed:
            if not waiting:
                self._wake.wait(self._every_s)
            self._wake.clear()
            fresh, self._fresh = self._fresh, []
            waiting.update(fresh)
            try:
                self._look()
                for ref in _ended(list(waiting)):
                    waiting.pop(ref)(_failure(ref))
            except Exception as error:  # noqa: BLE001  # Ray was shut down, say: nothing is learnt, calls go on
                log.warning("calls are not followed any more: %r", error)
                for told in waiting.values():
                    told("connection_lost")
                waiting.clear()


def _ended(refs: list[Any]) -> list[Any]:
    if not refs:
        return []
    ready, _ = ray.wait(refs, num_returns=1, timeout=_LOOK_S, fetch_local=False)
    if ready and len(refs) > 1:
        most = min(len(refs), _MOST_AT_ONCE)
        ready, _ = ray.wait(refs, num_returns=most, timeout=0, fetch_local=False)
    return list(ready)


def _failure(ref: Any) -> FailureReason | None:
    """What the end says of the place. Errors are small, so only what is small is looked at; no answer is fetched."""
    where = ray.experimental.get_object_locations([ref]).get(ref, {})
    if where.get("node_ids"):
        return None
    try:
        ray.get(ref, timeout=0)
    except ActorDiedError:
        return "replica_gone"
    except ActorUnavailableError:
        return "connection_lost"
    except RayError:
        return "rejected"
    except Exception:  # noqa: BLE001  # the program's own error, raised as its own type
        return "rejected"
    return None

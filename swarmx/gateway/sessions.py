"""Who is logged in to the web page: random ids in bounded memory that expire; a token is never kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from swarmx.core.errors import Forbidden, Unauthorized, Unavailable
from swarmx.gateway.keys import Key, Keyring
from swarmx.runtime.clock import Clock

LIFETIME_S = 8 * 3600.0
_MOST_SESSIONS = 1_000
_MOST_ADDRESSES = 1_000
_FAILURES = 10
_FAILURES_FOR_S = 300.0


@dataclass(slots=True, kw_only=True)
class Session:
    """One login. `key_sha256` finds its key again with each request, so that a revoked key ends it.

    `csrf` goes into every form. `notice` is shown once; `question` and `answer` are the last exchange with the
    console, for browsers that do not stream it.
    """

    key_sha256: str
    csrf: str
    ends_at_s: float
    notice: str = ""
    question: str = ""
    answer: list[dict[str, object]] = field(default_factory=list)


class Sessions:
    """At most 1,000 at a time: the oldest makes room. They end with the server."""

    def __init__(self, keys: Keyring, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock
        self._open: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, key: Key) -> str:
        """A session for the key; returns its id, of which only a hash is kept."""
        now_s = self._clock.now_s()
        for name in [name for name, session in self._open.items() if session.ends_at_s <= now_s]:
            del self._open[name]
        while len(self._open) >= _MOST_SESSIONS:
            self._open.popitem(last=False)
        session_id = secrets.token_urlsafe(32)
        self._open[_hash(session_id)] = Session(
            key_sha256=key.sha256, csrf=secrets.token_urlsafe(32), ends_at_s=now_s + LIFETIME_S
        )
        return session_id

    def find(self, session_id: str | None) -> tuple[Session, Key]:
        """The session with the key as it is now. Raises Unauthorized, Unavailable."""
        session = self._open.get(_hash(session_id or ""))
        if session is None or session.ends_at_s <= self._clock.now_s():
            raise Unauthorized("log in first.")
        try:
            keys = self._keys.all()
        except Unavailable:
            raise Unavailable("the keys cannot be read; the server's log says why.") from None
        for key in keys:
            if hmac.compare_digest(key.sha256, session.key_sha256):
                return session, key
        self.end(session_id)
        raise Unauthorized("the key of this session was revoked; log in with another.")

    def end(self, session_id: str | None) -> None:
        self._open.pop(_hash(session_id or ""), None)


class FailedLogins:
    """Counts wrong tokens by address over five minutes; too many close the door to that address for a while."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raises Forbidden while there were too many."""
        since_s = self._clock.now_s() - _FAILURES_FOR_S
        if sum(at_s > since_s for at_s in self._times.get(address, ())) >= _FAILURES:
            raise Forbidden("too many wrong tokens; wait five minutes.")

    def count(self, address: str) -> None:
        self._times.setdefault(address, deque(maxlen=_FAILURES)).append(self._clock.now_s())
        self._times.move_to_end(address)
        while len(self._times) > _MOST_ADDRESSES:
            self._times.popitem(last=False)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

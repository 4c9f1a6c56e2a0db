"""Where a Serve router keeps its decisions: a file of its own, a SwarmX gateway, or both."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import urllib.request
from collections import deque
from http.client import HTTPException
from pathlib import Path

import msgspec

from swarmx.core.nouns import Decision

log = logging.getLogger(__name__)

_FLUSH_S = 0.5
_BATCH = 256
_MOST_WAITING = 10_000
_TIMEOUT_S = 5.0


class DecisionLog:
    """One thread writes, so that the router never waits for a disk or a network.

    `path` gets a line of JSON for each decision, `url` (of a gateway, without a path) batches of them, with `token`.
    What cannot be kept is dropped, counted in `lost`, and told to the log once.
    """

    def __init__(self, *, path: Path | None, url: str = "", token: str = "") -> None:
        self.path = path
        self.lost = 0
        self._url = url.rstrip("/")
        self._token = token
        self._waiting: deque[Decision] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._complained = False
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._thread = threading.Thread(target=self._run, name="swarmx decisions", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, decision: Decision) -> None:
        """Take the decision in; it is on disk, or sent, about half a second later."""
        if len(self._waiting) >= _MOST_WAITING:
            self.lost += 1
            return
        self._waiting.append(decision)

    def close(self) -> None:
        """Write what is waiting, and end. Twice is fine."""
        atexit.unregister(self.close)
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=2 * _TIMEOUT_S)

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(_FLUSH_S)
            self._flush()
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            lines = b"".join(msgspec.json.encode(decision) + b"\n" for decision in batch)
            try:
                if self.path is not None:
                    with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
                        file.write(lines)
                if self._url:
                    self._send(lines)
            except (OSError, ValueError, HTTPException) as error:  # no disk, no network, no URL, no HTTP
                self.lost += len(batch)
                if not self._complained:
                    self._complained = True
                    log.warning("decisions of the SwarmX router cannot be kept, routing goes on: %s", error)

    def _send(self, lines: bytes) -> None:
        headers = {"Content-Type": "application/x-ndjson"}
        request = urllib.request.Request(f"{self._url}/api/v1/decisions", data=lines, headers=headers, method="POST")  # noqa: S310
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310  # the operator's own URL
            pass


def log_path(folder: str, deployment: str, process: str) -> Path:
    """A file that no other router writes."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{deployment}-{process}")
    return Path(folder) / f"{safe}-{os.getpid()}-{time.time_ns()}.decisions.jsonl"

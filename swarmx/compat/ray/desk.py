"""Between a Ray program and the chooser: opened at the first call, told of each end, and never in the way."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from swarmx.compat.ray.chooser import Chooser, Sent
from swarmx.compat.ray.options import RoutingOptions
from swarmx.compat.ray.watching import Watching
from swarmx.compat.ray_serve.decision_log import DecisionLog, log_path
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import FailureReason
from swarmx.runtime.clock import WallClock

log = logging.getLogger(__name__)

_NODES_EVERY_S = 2.0


class Desk:
    """The chooser of one pool, made when the first call comes: only then is Ray there.

    `look` gives the places that there are, with their slots, and is asked now and then; `on_gone` hears of one that is
    lost for good. Where SwarmX fails, `place` gives None, and the call goes as Ray would have it go.
    """

    def __init__(
        self,
        model: str,
        options: RoutingOptions,
        look: Callable[[], Mapping[str, int]],
        *,
        on_gone: Callable[[str], object] = lambda place: None,
    ) -> None:
        self.stood_in = 0
        self._model = model
        self._options = options
        self._look_at = look
        self._on_gone = on_gone
        self._looked_at_s = float("-inf")
        self._chooser: Chooser | None = None
        self._watching: Watching | None = None
        self._complained = False

    def place(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sent | None:
        """Where the call goes."""
        try:
            if self._chooser is None:
                self._open()
            assert self._chooser is not None  # noqa: S101  # it was opened
            return self._chooser.send(method, self._options.class_of(args, kwargs))
        except Exception as error:  # noqa: BLE001  # whatever it is, the program's call must go on
            self.stood_in += 1
            if not self._complained:
                self._complained = True
                log.warning("Ray places calls of %s, SwarmX did not: %r", self._model, error)
            return None

    def follow(self, sent: Sent, ref: Any) -> None:
        """Learn from the end of the call."""
        if self._chooser is None or self._watching is None:
            return
        chooser = self._chooser

        def told(failed: FailureReason | None) -> None:
            chooser.ended(sent, failed)
            if failed == "replica_gone":
                chooser.lost(sent.place)
                self._on_gone(sent.place)

        first = ref[0] if isinstance(ref, list) and ref else ref
        if isinstance(first, ray.ObjectRef):
            self._watching.add(first, told)
        else:  # a generator, or nothing at all: there is no end to see
            chooser.ended(sent, "rejected")

    def not_sent(self, sent: Sent) -> None:
        """Ray refused the call, so it never went."""
        if self._chooser is not None:
            self._chooser.ended(sent, "rejected")

    def in_flight(self) -> dict[str, int]:
        """Calls at each place; empty before the first call."""
        return {} if self._chooser is None else self._chooser.in_flight()

    def close(self) -> None:
        """Write what is not written, and learn no more."""
        if self._watching is not None:
            self._watching.close()
        if self._chooser is not None:
            self._chooser.close()

    def _open(self) -> None:
        if ray.util.client.ray.is_connected():
            raise ConfigError("a program that is connected by Ray Client does not see when its calls end")
        options, path = self._options, None
        process = ray.get_runtime_context().get_worker_id()[:12]
        if options.log_dir:
            path = log_path(options.log_dir, self._model, process)
        decisions = None
        if path is not None or options.log_url:
            decisions = DecisionLog(
                path=None if path is None else Path(path),
                url=options.log_url,
                token=os.environ.get(options.log_token_env, ""),
            )
        chooser = Chooser(self._model, options, clock=WallClock(), decisions=decisions)
        chooser.places(self._look_at())
        self._chooser, self._watching = chooser, Watching(self._look, every_s=_NODES_EVERY_S)

    def _look(self) -> None:
        now_s = time.monotonic()
        if self._chooser is not None and now_s >= self._looked_at_s + _NODES_EVERY_S:
            self._looked_at_s = now_s
            self._chooser.places(self._look_at())

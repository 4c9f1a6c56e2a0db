"""Keeps the coordinator's own vLLM running: starts it, waits for it to end, and starts it again after a while."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from swarmx.core.errors import ReplicaError
from swarmx.providers.process import VllmServer, check_model

log = logging.getLogger(__name__)


class CoordinatorModel:
    """Run it as a task; `url` is None whenever the server is not up, and cancelling the task ends the server.

    After each failure the wait doubles, from `first_wait_s` to `longest_wait_s`; a server that lived longer than that
    starts over. Raises ConfigError when there is nothing to start or to serve.
    """

    def __init__(
        self, *, model_dir: Path, name: str, log: Path, first_wait_s: float = 1.0, longest_wait_s: float = 120.0
    ) -> None:
        check_model(model_dir)
        self.url: str | None = None
        self._server = VllmServer(model_dir=model_dir, name=name, log=log)
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s

    async def run(self) -> None:
        """Until cancelled."""
        wait_s = self._first_wait_s
        try:
            while True:
                if await self._serve() > self._longest_wait_s:
                    wait_s = self._first_wait_s
                log.warning("the coordinator's model starts again in %g s; the rules stand in", wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(2.0 * wait_s, self._longest_wait_s)
        finally:
            self.url = None
            await self._server.stop()

    async def _serve(self) -> float:
        """Serve once; returns how long it was up, in seconds."""
        try:
            self.url = await self._server.start()
        except (ReplicaError, OSError) as error:
            log.warning("the coordinator's model does not start: %s", error)
            return 0.0
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        log.info("the coordinator's model serves at %s", self.url)
        status = await self._server.wait()
        self.url = None
        log.warning("the coordinator's model ended with %d; its log ends:\n%s", status, self._server.last_words())
        return loop.time() - began_s

"""What nodes cost, kept in a file between two lives of a front."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from swarmx.core.errors import PredictorError
from swarmx.gateway.keys import write_private
from swarmx.neural.node_costs import NodeCosts

log = logging.getLogger(__name__)

FILE_NAME = "node_costs.json"
_EVERY_S = 30.0


class KeptCosts:
    """The file in a folder. A file that cannot be read is put aside under `.refused`, and all is learnt anew."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._written = b""

    def read(self) -> NodeCosts:
        """What was kept; nothing in the first life. Never raises."""
        try:
            raw = self._path.read_bytes()
            costs = NodeCosts.loaded(raw)
        except FileNotFoundError:
            return NodeCosts()
        except (OSError, PredictorError) as error:
            aside = self._path.with_suffix(".json.refused")
            log.warning(
                "%s is refused, seconds of nodes are learnt anew; it is put aside as %s: %s", self._path, aside, error
            )
            try:
                self._path.replace(aside)
            except OSError as problem:
                log.warning("%s cannot be put aside: %s", self._path, problem)
            return NodeCosts()
        self._written = raw
        return costs

    async def run(self, costs: NodeCosts) -> None:
        """Write what is new, now and then, for ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.write(costs)

    async def write(self, costs: NodeCosts) -> None:
        """Replace the file, if there is something new. A disk that is full costs what was learnt, and nothing else."""
        raw = costs.dumped()
        if raw == self._written:
            return
        try:
            await asyncio.to_thread(write_private, self._path, raw)
            self._written = raw
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror or error)

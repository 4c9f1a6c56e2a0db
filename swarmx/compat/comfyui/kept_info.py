"""What servers said that they can run, kept in a file between two lives of a front."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.gateway.keys import write_private

log = logging.getLogger(__name__)

FILE_NAME = "object_info.json"
_EVERY_S = 5.0

_Kept = dict[str, dict[str, dict[str, Any]]]


class KeptInfo:
    """The file in a folder: a graph for a server that is away when a front begins can wait for it.

    A file that cannot be read is told of and written anew once the servers have said what they have.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._written = 0  # the generation of the book that is in the file

    async def read(self, book: NodeBook, servers: Collection[str]) -> None:
        """Tell the book what these servers had. Never raises."""
        try:
            raw = await asyncio.to_thread(self._path.read_bytes)
            kept = msgspec.json.decode(raw, type=_Kept)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("%s cannot be read; graphs wait for no server that has not answered yet: %s", self._path, error)
            return
        for server, infos in kept.items():
            if server in servers:
                book.told(server, infos)
        self._written = book.generation

    async def run(self, book: NodeBook) -> None:
        """Write what is new, now and then, for ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.write(book)

    async def write(self, book: NodeBook) -> None:
        """Replace the file, if there is something new. A disk that is full costs what it is for, and nothing else."""
        generation = book.generation
        if generation == self._written:
            return
        try:
            await asyncio.to_thread(lambda kept: write_private(self._path, msgspec.json.encode(kept)), book.infos)
            self._written = generation
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror or error)

"""The HTTP server of a replica that another process started, and that is to end with it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import uvicorn


class ChildServer(uvicorn.Server):
    """A server that, with `exit_with_parent`, also stops when the other end of stdin is closed."""

    def __init__(self, config: uvicorn.Config, *, exit_with_parent: bool) -> None:
        super().__init__(config)
        self._exit_with_parent = exit_with_parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._exit_with_parent:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._read_stdin)

    def _read_stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.should_exit = True

"""Waits for file descriptors (pipes and pidfds) of processes, on the loop and without a thread."""

from __future__ import annotations

import asyncio
import os

_CHUNK_BYTES = 64 * 1024


async def readable(descriptor: int) -> None:
    """Return once there is something to read, or the other end is gone; for a pidfd, once the process has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def read_some(descriptor: int) -> bytes:
    """The next bytes of a non-blocking pipe, nothing at its end."""
    while True:
        await readable(descriptor)
        try:
            return os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            continue


async def write_all(descriptor: int, data: bytes) -> None:
    """Write to a non-blocking pipe. Raises BrokenPipeError when nobody reads it any more."""
    loop = asyncio.get_running_loop()
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            ready: asyncio.Future[None] = loop.create_future()
            loop.add_writer(descriptor, _resolve, ready)

            try:
                await ready
            finally:
                loop.remove_writer(descriptor)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)

"""The link to a Ray cluster: takes requests on standard input, answers on standard output, tells what happens there.

A process of its own, because Ray ends the process that is connected to it when its control plane stays away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, assert_never

import msgspec

from swarmx.core.errors import ReplicaError
from swarmx.providers.ray.wire import (
    Answer,
    Curve,
    Deploy,
    Ended,
    Failed,
    Find,
    Found,
    Leaving,
    Load,
    Lost,
    News,
    Noticed,
    Request,
    Retire,
    Standing,
    Up,
    Wanted,
)


class Nodes(Protocol):
    """What the link needs of a cluster; `providers.ray.cluster` is the real one."""

    async def place(self, wanted: Wanted) -> Standing: ...
    async def remove(self, replica_id: str) -> None: ...
    async def standing(self) -> list[Standing]: ...
    async def end_of(self, replica_id: str) -> str: ...


class Link:
    """Each request is a task; a Retire calls off the Deploy of the same replica."""

    def __init__(self, nodes: Nodes, *, answer: Callable[[Answer], None]) -> None:
        self._nodes = nodes
        self._answer = answer
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._follows: dict[str, asyncio.Task[None]] = {}
        self._where: dict[str, str] = {}  # the node of each replica
        self._leaving: dict[str, Leaving] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, line: bytes) -> None:
        """Begin what a request asks for. Raises msgspec.MsgspecError for what is none."""
        request = msgspec.json.decode(line, type=Request)
        task = asyncio.create_task(self._carry_out(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if isinstance(request, Deploy):
            self._starts[request.wanted.replica.replica_id] = task

    def hear(self, news: News) -> None:
        """Pass on what the lookout has."""
        match news:
            case Load() | Curve():
                self._answer(news)
            case Leaving():
                self._leaving[news.node_id] = news
                for replica_id, node_id in self._where.items():
                    if node_id == news.node_id:
                        self._answer(Noticed(replica_id=replica_id, left_s=news.left_s))
            case _:
                assert_never(news)

    async def _carry_out(self, request: Request) -> None:
        try:
            match request:
                case Deploy():
                    standing = await self._nodes.place(request.wanted)
                    self._answer(Up(number=request.number, standing=standing))
                    self._follow(standing)
                case Retire():
                    await self._retire(request.replica_id)
                    self._answer(Ended(number=request.number))
                case Find():
                    found = await self._nodes.standing()
                    self._answer(Found(number=request.number, standing=found))
                    for standing in found:
                        self._follow(standing)
                case _:
                    assert_never(request)
        except ReplicaError as error:
            self._answer(Failed(number=request.number, problem=str(error)))
        except asyncio.CancelledError:
            self._answer(Failed(number=request.number, problem="its start was called off"))
            raise
        except Exception as error:  # noqa: BLE001  # whatever Ray raises is the answer
            self._answer(Failed(number=request.number, problem=f"Ray: {error!r}"))

    async def _retire(self, replica_id: str) -> None:
        if (start := self._starts.pop(replica_id, None)) is not None and not start.done():
            start.cancel()
            await asyncio.wait((start,))
        if (follow := self._follows.pop(replica_id, None)) is not None:
            follow.cancel()
        self._where.pop(replica_id, None)
        await self._nodes.remove(replica_id)

    def _follow(self, standing: Standing) -> None:
        replica_id = standing.wanted.replica.replica_id
        if replica_id in self._follows:
            return
        self._where[replica_id] = standing.node_id
        self._follows[replica_id] = asyncio.create_task(self._until_over(replica_id))
        if (leaving := self._leaving.get(standing.node_id)) is not None:
            self._answer(Noticed(replica_id=replica_id, left_s=leaving.left_s))

    async def _until_over(self, replica_id: str) -> None:
        problem = await self._nodes.end_of(replica_id)
        del self._follows[replica_id]
        self._where.pop(replica_id, None)
        self._answer(Lost(replica_id=replica_id, problem=problem))

"""The Ray cluster as the link uses it: actors placed, found by name, followed to their end, and killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import ray
from ray._private.state import state
from ray.exceptions import RayActorError, RayError

from swarmx.core.errors import ReplicaError
from swarmx.providers.ray.actor import ReplicaActor
from swarmx.providers.ray.lookout import find_lookout
from swarmx.providers.ray.placing import REPLICA, Node, actor_options, misfit
from swarmx.providers.ray.wire import News, Standing, Wanted

log = logging.getLogger(__name__)

_ASK_S = 15.0
_GONE_S = 20.0
_AGAIN_S = 1.0
_END_S = 30.0  # an engine may take ten to end


class Cluster:
    """Connected on entry, by `address`, in a namespace of its own. Blocks while it connects; raises Ray's errors."""

    def __init__(self, address: str, namespace: str) -> None:
        self._namespace = namespace
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
        self._via_client = ray.util.client.ray.is_connected()

    def close(self) -> None:
        ray.shutdown()

    async def place(self, wanted: Wanted) -> Standing:
        """Have the actor of a replica placed and its engine started. Raises ReplicaError, with nothing left of it."""
        replica_id = wanted.replica.replica_id
        if (problem := misfit(wanted.place, await self.nodes())) is not None:
            raise ReplicaError(f"replica {replica_id} has no place on the Ray cluster: {problem}")
        actor = None
        try:
            async with asyncio.timeout(wanted.engine.start_s):
                actor = await asyncio.to_thread(self._create, wanted)
                found, problem = await actor.up.remote()
        except TimeoutError:
            await self.remove(replica_id)
            raise ReplicaError(
                f"replica {replica_id} was not up on the Ray cluster within {wanted.engine.start_s:.0f} s; a node "
                f"with {wanted.place.resources or 'room'} may be busy, or there is none that is not leaving"
            ) from None
        except ValueError:  # the name is taken: whoever has it stays as it is
            raise ReplicaError(
                f"replica {replica_id} is running already: choose another id, or retire it first"
            ) from None
        except RayError as error:
            await self.remove(replica_id)
            raise ReplicaError(f"replica {replica_id} did not start on the Ray cluster: {error}") from None
        except BaseException:
            await self.remove(replica_id)
            raise
        if found is None:
            await self.remove(replica_id)
            raise ReplicaError(f"replica {replica_id}: {problem}")
        return msgspec.json.decode(found, type=Standing)

    async def remove(self, replica_id: str) -> None:
        """End the replica and its actor; returns once its name is free. One that is not there is fine."""
        actor = await self._find(replica_id)
        if actor is None:
            return
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(_END_S):
                await actor.end.remote()
        ends_s = asyncio.get_running_loop().time() + _GONE_S
        while actor is not None and asyncio.get_running_loop().time() < ends_s:
            with contextlib.suppress(RayError, ValueError):
                await asyncio.to_thread(ray.kill, actor)
            await asyncio.sleep(0.05)
            actor = await self._find(replica_id)

    async def standing(self) -> list[Standing]:
        """The replicas of this namespace that are up; actors of which none is any more are removed."""
        names = await asyncio.to_thread(ray.util.list_named_actors)
        ids = [name.removeprefix(REPLICA) for name in names if name.startswith(REPLICA)]
        found = await asyncio.gather(*(self._standing(replica_id) for replica_id in ids))
        return [standing for standing in found if standing is not None]

    async def end_of(self, replica_id: str) -> str:
        """Returns the reason once the replica is no more."""
        while (actor := await self._find(replica_id)) is not None:
            try:
                return str(await actor.over.remote())
            except RayActorError as error:
                if type(error).__name__ != "ActorUnavailableError":
                    return f"its actor is gone: {str(error).splitlines()[0]}"
                await asyncio.sleep(_AGAIN_S)
        return "its actor is gone"

    async def news(self) -> AsyncIterator[News]:
        """What observers and nodes say, for ever; a lookout that is lost is made again."""
        life = after = 0
        while True:
            try:
                lookout = await asyncio.to_thread(find_lookout, self._namespace)
                while True:
                    life, after, found = await lookout.news.remote(life, after)
                    for data in found:
                        yield msgspec.json.decode(data, type=News)
            except Exception as error:  # noqa: BLE001  # news are a help: without them the gateway asks
                log.info("no news of the lookout for now: %r", error)
                await asyncio.sleep(_AGAIN_S)

    async def nodes(self) -> list[Node]:
        """Those that are alive."""
        rows = await asyncio.to_thread(ray.nodes)
        leaving: set[str] = set()
        if not self._via_client:
            leaving = set(await asyncio.to_thread(state.get_draining_nodes))
        return [
            Node(
                node_id=row["NodeID"],
                resources=row["Resources"],
                labels=row["Labels"],
                is_leaving=row["NodeID"] in leaving,
            )
            for row in rows
            if row["Alive"]
        ]

    def _create(self, wanted: Wanted) -> Any:
        options = actor_options(wanted.place)
        name = REPLICA + wanted.replica.replica_id
        form = ray.remote(ReplicaActor).options(
            name=name, lifetime="detached", max_restarts=0, max_concurrency=1000, **options
        )
        return form.remote(msgspec.json.encode(wanted), self._namespace)

    async def _find(self, replica_id: str) -> Any:
        def found() -> Any:
            try:
                return ray.get_actor(REPLICA + replica_id)
            except ValueError:
                return None

        return await asyncio.to_thread(found)

    async def _standing(self, replica_id: str) -> Standing | None:
        actor = await self._find(replica_id)
        if actor is None:
            return None
        try:
            async with asyncio.timeout(_ASK_S):
                data = await actor.standing.remote()
        except (RayError, TimeoutError):
            data = None
        if data is None:
            await self.remove(replica_id)
            return None
        return msgspec.json.decode(data, type=Standing)

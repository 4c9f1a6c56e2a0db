"""`Router`: a request router that a Serve config file names, deciding with SwarmX's agents.

Serve ships this class by value to every process that calls the deployment, so this module imports nothing of SwarmX
before it is used: where SwarmX is not installed, Serve's own router stands in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

if TYPE_CHECKING:
    from swarmx.compat.ray_serve.desk import Desk
    from swarmx.compat.ray_serve.ticket import Ticket

_LOGGER = "ray.serve"
_FALLBACK = PowerOfTwoChoicesRequestRouter
_MOST_FAULTS = 5  # in a row, then Serve's own router is in charge for a while
_REST_S = 30.0
_WORK_KNOWN_S = 1.0  # after the end of a request, within which its answer should have been read
_MOST_TIMES = 4096  # of the last decisions that are kept
_FIRST_BACKOFF_S, _MOST_BACKOFF_S = 0.005, 0.1
_TICKET, _STANDS_IN = "_swarmx_ticket", "_swarmx_stands_in"  # on requests


class Router(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses by SwarmX's router agent; by `PowerOfTwoChoicesRequestRouter` wherever SwarmX cannot.

    That is: SwarmX is not installed in this process, the options cannot be read, the agent raised (five times in a row
    rest it for half a minute), the request asks for a multiplexed model, or Serve does not ask replicas whether they
    accept (Ray Client). `swarmx_status` tells which, and how often.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve with the `request_router_kwargs` of the config file."""
        self._desk: Desk | None = None
        self._absent = ""
        self._options: Any = None
        self._decided = self._stood_in = self._faults = self._faults_in_row = 0
        self._rests_until = 0.0
        self._by_id: dict[str, RunningReplica] = {}
        self._replies: dict[str, int] = {}
        self._looking: asyncio.Task[None] | None = None
        self._asked_s: deque[tuple[float, float]] = deque(maxlen=_MOST_TIMES)
        self._added_s: deque[float] = deque(maxlen=_MOST_TIMES)
        try:
            from swarmx.compat.ray_serve.options import read_options

            self._options = read_options(kwargs)
        except ImportError as error:
            self._give_up(f"SwarmX is not installed in this process ({error})")
        except Exception as error:  # noqa: BLE001  # a router that raises here takes the deployment down
            self._give_up(f"the options cannot be read ({error})")

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """The agent's choice, made where Serve asks for it, as Serve's own `CapacityQueueRouter` does it.

        A routing task would have to wait for its turns, and those of others come in between.
        """
        while self._decides(pending_request):
            if not self._replicas:
                self._replicas_updated_event.clear()
                await self._replicas_updated_event.wait()
            elif (replica := await self._choice(pending_request)) is not None:
                return replica
        setattr(pending_request, _STANDS_IN, True)
        self._stood_in += 1
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """For those who only pick: the agent's choice. For those whom Serve's own router serves: the two from which it
        chooses."""
        if pending_request is not None and self._decides(pending_request):
            pending_request.routing_context.should_backoff = True
            replica = await self._choice(pending_request)
            return [] if replica is None else [[replica]]
        chosen: list[list[RunningReplica]] = await _FALLBACK.choose_replicas(self, candidate_replicas, pending_request)
        return chosen

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's news of which replicas there are."""
        super().update_replicas(replicas)
        self._by_id = {replica.replica_id.unique_id: replica for replica in self._replicas_list}
        if self._in_charge():
            self._guarded(self._open_desk)  # before the first request: it reads the predictor's weights
            self._guarded(self._tell_replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._by_id.pop(replica_id.unique_id, None)
        if self._desk is not None:
            self._guarded(self._desk.lost, replica_id.unique_id)

    def on_new_queue_len_info(self, replica_id: Any, num_ongoing_requests: int) -> None:
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._replies[replica_id.unique_id] = num_ongoing_requests

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """The replica has accepted the request."""
        ticket: Ticket | None = getattr(pending_request, _TICKET, None)
        if ticket is not None and self._desk is not None:
            self._guarded(self._accepted, ticket, replica_id, result)

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """Replicas whose answers are seen, and asked for again where that is allowed."""
        if self._options is None:
            return super().create_replica_wrapper(replica_info)
        from swarmx.compat.ray_serve.retrying import WatchedReplica

        return WatchedReplica(replica_info, self)

    def swarmx_status(self) -> dict[str, Any]:
        """Who decides here and how often each did, and seconds of the last decisions.

        `decision_s` are those in which the agent was asked, by the wall, and `decision_busy_s` of the thread;
        `added_s` all that a request was kept by the wall, but for the time for which it waited on purpose: for one
        that waited, too, from when that began to be handled which got it its place.
        """
        return {
            "in_charge": "swarmx" if self._in_charge() else _FALLBACK.__name__,
            "absent": self._absent,
            "decided": self._decided,
            "stood_in": self._stood_in,
            "faults": self._faults,
            "waiting": 0 if self._desk is None else self._desk.waiting,
            "decision_s": [wall for wall, _ in self._asked_s],
            "decision_busy_s": [busy for _, busy in self._asked_s],
            "added_s": list(self._added_s),
        }

    def _in_charge(self) -> bool:
        return self._options is not None and self._use_replica_queue_len_cache and time.monotonic() >= self._rests_until

    def _decides(self, pending_request: PendingRequest) -> bool:
        """Whether the agent chooses for this request; once Serve's own router has it, it keeps it."""
        return (
            self._in_charge()
            and not pending_request.metadata.multiplexed_model_id
            and not hasattr(pending_request, _STANDS_IN)
        )

    async def _choice(self, pending_request: PendingRequest) -> RunningReplica | None:
        """The replica that the agent has found; None if it left meanwhile, or the agent failed."""
        try:
            replica_id = await self._chosen(pending_request)
        except Exception as error:  # noqa: BLE001  # whatever goes wrong here, the request is served
            self._failed(error)
            setattr(pending_request, _STANDS_IN, True)
            return None
        self._faults_in_row = 0
        replica = self._by_id.get(replica_id)
        self._decided += replica is not None
        return replica

    async def _chosen(self, pending_request: PendingRequest) -> str:
        desk = self._open_desk()
        ticket: Ticket | None = getattr(pending_request, _TICKET, None)
        running = None
        begun = time.perf_counter(), time.thread_time()
        if ticket is None:
            ticket = self._ticket(desk, pending_request)
            setattr(pending_request, _TICKET, ticket)
        elif ticket.replica_id is not None:
            running = self._replies.get(ticket.replica_id)
            if ticket.attempt >= 3:  # nobody takes it, though they should have room: not as fast as we can
                await asyncio.sleep(min(_MOST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(10, ticket.attempt - 3)))
                begun = time.perf_counter(), time.thread_time()
        chosen = desk.ask(ticket, running=running)
        asked_s = time.perf_counter() - begun[0]
        self._asked_s.append((asked_s, time.thread_time() - begun[1]))
        at_once = chosen.done()
        if not at_once and (self._looking is None or self._looking.done()):
            self._looking = asyncio.ensure_future(self._look_again(desk))
        try:
            replica_id = await chosen
        except asyncio.CancelledError:
            desk.cancelled(ticket)
            raise
        self._added_s.append(asked_s if at_once else asked_s + desk.since_placed_s(ticket))
        ticket.queued_s = time.time() - pending_request.created_at
        return replica_id

    def _ticket(self, desk: Desk, pending_request: PendingRequest) -> Ticket:
        metadata = pending_request.metadata
        call, prompt = self._call_from(
            pending_request.args,
            pending_request.kwargs,
            deployment=desk.deployment,
            method=metadata.call_method,
            workflow_id=metadata.session_id or metadata.request_id,
            workflow_kind=metadata.route or metadata.app_name or self.app_name,
            session=metadata.session_id,
        )
        return desk.ticket(call, prompt)

    def _open_desk(self) -> Desk:
        """On the loop that routes: Serve makes routers on other threads."""
        if self._desk is None:
            from swarmx.compat.ray_serve.answered import outcomes
            from swarmx.compat.ray_serve.asked import call_from
            from swarmx.compat.ray_serve.link import open_desk

            self._call_from, self._outcomes = call_from, outcomes  # an import costs each request, though it is done
            self._desk = open_desk(self._deployment_id, self._options)
            self._tell_replicas()
        return self._desk

    def _seen(self) -> list[tuple[str, int, dict[str, Any]]]:
        return [(r.replica_id.unique_id, r.max_ongoing_requests, r.routing_stats or {}) for r in self._replicas_list]

    def _tell_replicas(self) -> None:
        if self._desk is not None:
            from swarmx.compat.ray_serve.link import tell_replicas

            tell_replicas(self._desk, self._seen())

    def _accepted(self, ticket: Ticket, replica_id: Any, result: Any) -> None:
        desk, loop = self._open_desk(), self._event_loop
        desk.accepted(ticket)
        if ticket.queued_s > 0.0:  # of one that Serve's own router served, its routing task has told
            self.queue_wait_time_ms_histogram.observe(1e3 * ticket.queued_s)
        if (running := self._replies.get(replica_id.unique_id)) is not None:
            desk.counted(replica_id.unique_id, running)

        def over(value: Any) -> None:
            loop.call_soon_threadsafe(self._guarded, self._over, ticket, value)

        result.add_done_callback(over)
        if hasattr(result, "watch"):
            result.watch(lambda work: loop.call_soon_threadsafe(self._guarded, desk.worked, ticket, work))

    def _over(self, ticket: Ticket, value: Any) -> None:
        desk = self._open_desk()
        failed = self._outcomes(value)
        desk.ended(ticket, failed=failed)
        if failed is None:
            self._event_loop.call_later(_WORK_KNOWN_S, self._guarded, desk.worked, ticket, None)

    async def _look_again(self, desk: Desk) -> None:
        """While requests wait: ask the replicas what they have, since nobody may have told that one has room."""
        while desk.waiting:
            await asyncio.sleep(self._options.look_again_s)
            if desk.waiting:
                for replica, count in await self._probe_queue_lens(list(self._replicas_list), 0):
                    if count is not None:
                        desk.counted(replica.replica_id.unique_id, count)

    def _guarded(self, step: Any, *args: Any) -> None:
        """A step of SwarmX's that must not fail the request behind it."""
        try:
            step(*args)
        except Exception as error:  # noqa: BLE001
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._faults += 1
        self._faults_in_row += 1
        logger = logging.getLogger(_LOGGER)
        if self._faults_in_row == 1:
            logger.warning("SwarmX could not route a request, %s did: %r", _FALLBACK.__name__, error, exc_info=error)
        if self._faults_in_row >= _MOST_FAULTS:
            self._faults_in_row, self._rests_until = 0, time.monotonic() + _REST_S
            logger.error(
                "SwarmX failed %d times in a row; %s routes for %g s", _MOST_FAULTS, _FALLBACK.__name__, _REST_S
            )

    def _give_up(self, why: str) -> None:
        self._absent = why
        logging.getLogger(_LOGGER).warning(
            "%s routes for %s in process %d: %s", _FALLBACK.__name__, self._deployment_id, os.getpid(), why
        )

"""One request on its way through a Serve router, and the replicas that it may go to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import numpy as np

from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding, PromptText

UNREAD = Encoding(encoder="", vector=np.zeros(0, dtype=np.float32))


class NoReplica(Exception):
    """The agent gave the call up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A replica that Serve knows."""

    replica_id: str
    max_ongoing: int


class Ticket(msgspec.Struct, kw_only=True, eq=False):
    """One request on its way through a router: its call, and where it is."""

    call: Call
    prompt: PromptText | None  # until it is read
    forecast: Forecast
    encoding: Encoding = UNREAD
    chosen: asyncio.Future[str] | None = None
    attempt: int = 0
    replica_id: str | None = None
    sent_at_s: float = 0.0
    placed_at_s: float = 0.0  # when that began to be handled which led to the place
    area: float = 0.0  # of the replica's calls in flight over time, when it was sent
    accepted: bool = False
    queued_s: float = 0.0  # from when Serve had its arguments until it had a replica
    took_s: float | None = None
    batch: float = 1.0
    said: float | None = None  # the work that its answer told
    work: float | None = None  # what was learnt from it
    over: bool = False

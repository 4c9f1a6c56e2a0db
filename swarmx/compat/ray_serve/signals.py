"""What replicas push to routers, and routers to the scaler, over SwarmX's own channel."""

from __future__ import annotations

import msgspec

from swarmx.core.engine import EngineProfile
from swarmx.core.messages import DemandReported


class ReplicaSignal(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's own word, said `at_s` (Unix seconds): calls that run there and wait there, from all routers.

    `profile` is what its last calls, `calls` of them so far, showed of its speed; None before the first.
    """

    deployment: str
    replica_id: str
    at_s: float
    running: int
    waiting: int = 0
    kv_usage: float = 0.0
    profile: EngineProfile | None = None
    calls: int = 0


class RouterReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one router saw of the demand for its deployment."""

    deployment: str
    router: str
    at_s: float
    demand: DemandReported


_ENCODER = msgspec.msgpack.Encoder()
_SIGNAL = msgspec.msgpack.Decoder(ReplicaSignal)
_REPORT = msgspec.msgpack.Decoder(RouterReport)


def packed(value: ReplicaSignal | RouterReport) -> bytes:
    """As bytes: what travels says the same to another version of SwarmX."""
    return _ENCODER.encode(value)


def signal_in(data: bytes) -> ReplicaSignal:
    """Raises msgspec.MsgspecError."""
    return _SIGNAL.decode(data)


def report_in(data: bytes) -> RouterReport:
    """Raises msgspec.MsgspecError."""
    return _REPORT.decode(data)

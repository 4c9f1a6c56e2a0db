"""What the gateway, its link to Ray and the actors on the nodes say to each other: JSON, as ages may differ."""

from __future__ import annotations

import msgspec

from swarmx.core.messages import ServiceCurvePublished
from swarmx.core.nouns import Replica


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """How to start the server of a replica, on whichever node.

    In `argv`, `{python}` is the interpreter there and `{port}` a free port of its loopback; without `{port}` the server
    says `{"port": N}` on its first line. `token_variable` is where it looks for the token that its callers show. It is
    up, or has failed, after `start_s` seconds.
    """

    argv: tuple[str, ...]
    start_s: float
    env: dict[str, str] = {}
    token_variable: str = ""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica takes of its node (by Ray's names: CPU, GPU, memory or own ones), and which labels that has."""

    resources: dict[str, float] = {}
    labels: dict[str, str] = {}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as its actor gets it: `replica` has no address yet.

    Its callers have to show `token`. When nobody has asked for it for `orphan_s` seconds, it ends by itself.
    """

    replica: Replica
    group_id: str
    engine: Engine
    place: Place
    token: str
    orphan_s: float


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that is up, at `url`, on a node of Ray."""

    wanted: Wanted
    url: str
    node_id: str


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the observer beside a replica read of its engine just now."""

    replica_id: str
    running: int
    waiting: int
    kv_usage: float


class Curve(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the predictor beside a replica says."""

    curve: ServiceCurvePublished


class Leaving(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A node is to go in `left_s` seconds; None when nobody said when."""

    node_id: str
    left_s: float | None


News = Load | Curve | Leaving


class Deploy(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Have a replica; answered by Up or Failed."""

    number: int
    wanted: Wanted


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a replica, also one that is starting; answered by Ended or Failed."""

    number: int
    replica_id: str


class Find(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Which replicas are up? Answered by Found or Failed."""

    number: int


Request = Deploy | Retire | Find


class Up(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int
    standing: Standing


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int


class Found(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int
    standing: list[Standing]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    number: int
    problem: str


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A replica that was up is not any more, and nobody had asked for its end."""

    replica_id: str
    problem: str


class Noticed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The node of a replica goes in `left_s` seconds; None when nobody said when."""

    replica_id: str
    left_s: float | None


class Connected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The link has reached the cluster."""


Answer = Up | Ended | Found | Failed | Lost | Noticed | Load | Curve | Connected

"""The jobs of the front: one graph each, from acceptance to its one end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from swarmx.compat.comfyui.graph import Graph, above

State = Literal["pending", "in_progress", "completed", "failed", "cancelled"]
"""In the words of ComfyUI's jobs API."""
Event = tuple[str, dict[str, Any]]
"""The type and the data of what a server or this front says over a websocket."""
File = tuple[str, str, str]
"""Folder, subfolder and name of an output."""
ENDED: frozenset[State] = frozenset({"completed", "failed", "cancelled"})

_CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# Keys for paid services that clients hand to their nodes: they are for the server alone.
_SECRETS = frozenset({"auth_token_comfy_org", "api_key_comfy_org"})


class PartOf(msgspec.Struct, frozen=True, kw_only=True):
    """Which part it is, of the job `of`, and the latents that it makes for others and needs of others, by number.

    `cuts` are the node and the output that made those that it needs.
    """

    of: str
    number: int
    makes: tuple[int, ...] = ()
    needs: tuple[int, ...] = ()
    cuts: dict[int, tuple[str, int]] = {}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a client submitted, and what is needed to run it: stored before the client hears of it.

    `order` is (number, how-manieth): lower ones of the same tenant and priority go first. `able` is not kept: which
    servers can run it is asked anew after a restart. Times are Unix seconds. With `part`, it is a piece of a job that
    runs on several servers, and no client knows of it. `size_bytes` is what its graph and `extra` come to as JSON.
    """

    prompt_id: str
    tenant: str
    client_id: str | None
    number: float
    seq: int
    priority: int
    graph: Graph
    extra: dict[str, Any]
    outputs: tuple[str, ...]
    files: frozenset[tuple[str, str]]
    created_s: float
    part: PartOf | None = None
    size_bytes: int = 0

    @property
    def shown_id(self) -> str:
        """The id under which its client knows it."""
        return self.prompt_id if self.part is None else self.part.of

    @property
    def order(self) -> tuple[float, int]:
        return self.number, self.seq

    @property
    def needed(self) -> Graph:
        """The nodes that its outputs need; of a part all: it has what the whole job needs, for its pictures."""
        return self.graph if self.part is not None else above(self.graph, self.outputs)

    @property
    def workflow_id(self) -> str | None:
        """The workflow that the graph was made of, where its client says so."""
        return workflow_in(self.extra)

    def row(self) -> list[Any]:
        """As `/queue` and `/history` show it: without secrets."""
        return [self.number, self.prompt_id, self.graph, self.shared_extra, list(self.outputs)]

    @property
    def shared_extra(self) -> dict[str, Any]:
        """`extra` without secrets."""
        return {key: value for key, value in self.extra.items() if key not in _SECRETS}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a job, or of a part of one: what its server kept of it, with files named as the server's.

    `facts` are ours: where it ran, how long it waited. `told` are the last events, which its client hears once this is
    stored; one without a status ended before it began.
    """

    state: State
    outputs: dict[str, Any] = {}
    status: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    told: list[Event] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job ended. `history` is what `/history` shows of it, as JSON."""

    state: State
    ended_s: float
    history: bytes


def is_canonical(prompt_id: object) -> bool:
    """Whether a client may name its job so: a UUID in lower case, as newer servers want it."""
    return isinstance(prompt_id, str) and _CANONICAL.fullmatch(prompt_id) is not None


def workflow_in(extra: object) -> str | None:
    """The id of the workflow in what a client sent beside a graph, as ComfyUI's web page does."""
    for key in ("extra_pnginfo", "workflow", "id"):
        extra = extra.get(key) if isinstance(extra, dict) else None
    return extra if isinstance(extra, str) else None

"""How long a job will take on a server: the port, and a forecaster that learns what nodes cost.

A server's state is a feature: what it has in memory need not be loaded, and what it computed for its last job need not
be computed again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from swarmx.compat.comfyui.graph import Graph, models_in, signatures
from swarmx.core.forecast import Forecast
from swarmx.neural.heads.comfy_graph import graph_key
from swarmx.neural.heads.comfy_nodes import NodeWork, node_works
from swarmx.neural.node_costs import NodeCosts

_RESIDENT = 3  # models that a server is taken to keep
_LOAD_FALL = 0.2
# What a job takes beside its nodes: the way there and back, and what the server does between them.
_REST = NodeWork(node="", class_type="")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """A node of a job: its work, a name for what it computes, and the weights that it names itself."""

    work: NodeWork
    signature: str
    loads: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What a forecast may know of a job: read once. `nodes` are those above its outputs, by id."""

    key: str
    nodes: Mapping[str, NodeFacts]
    models: frozenset[str]
    signatures: frozenset[str]

    @classmethod
    def of(cls, graph: Graph, outputs: tuple[str, ...], whole: Graph | None = None) -> JobFacts:
        """Read a valid graph. Of one that loads latents, `whole` is the graph that says how large they are."""
        names, works = signatures(graph, outputs), node_works(graph if whole is None else whole)
        nodes = {}
        for node_id, name in names.items():
            node = graph[node_id]
            work = works.get(node_id) or NodeWork(node=node_id, class_type=node["class_type"][:100].lower())
            nodes[node_id] = NodeFacts(work=work, signature=name, loads=models_in({node_id: node}))
        return cls(
            key=graph_key(graph),
            nodes=nodes,
            models=frozenset[str]().union(*(node.loads for node in nodes.values())),
            signatures=frozenset(names.values()),
        )

    def only(self, wanted: AbstractSet[str]) -> JobFacts:
        """Of these nodes alone."""
        if self is UNREAD:
            return self
        nodes = {node_id: node for node_id, node in self.nodes.items() if node_id in wanted}
        return JobFacts(
            key=self.key,
            nodes=nodes,
            models=frozenset[str]().union(*(node.loads for node in nodes.values())),
            signatures=frozenset(node.signature for node in nodes.values()),
        )


UNREAD = JobFacts(key="", nodes={}, models=frozenset(), signatures=frozenset())
"""Of a job whose graph cannot be read."""


@dataclass(slots=True, kw_only=True)
class ServerState:
    """What the front knows of a server's memory: the models that it ran last, and what its last job computed.

    `changes` counts how often that has changed.
    """

    name: str
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    cached: frozenset[str] = frozenset()
    changes: int = 0

    def ran(self, facts: JobFacts, ended: AbstractSet[str] | None = None) -> None:
        """The server has done a job, or of one that was stopped the nodes that `ended`.

        It keeps the results of the last job alone: those that it had already, and those that are new.
        """
        done = [node for node_id, node in facts.nodes.items() if ended is None or node_id in ended]
        models = frozenset[str]().union(*(node.loads for node in done))
        for model in models:
            self.resident[model] = None
            self.resident.move_to_end(model)
        while len(self.resident) > max(_RESIDENT, len(models)):
            self.resident.popitem(last=False)
        self.changes += 1
        self.cached = facts.signatures & (self.cached | {node.signature for node in done})

    def forget(self) -> None:
        """The server has started anew, or was told to free its memory."""
        self.changes += 1
        self.resident.clear()
        self.cached = frozenset()

    def copy(self) -> ServerState:
        """As it is now."""
        return ServerState(name=self.name, resident=self.resident.copy(), cached=self.cached)

    def to_load(self, facts: JobFacts) -> AbstractSet[str]:
        """The models of a job that it has to load first."""
        return facts.models - self.resident.keys()


class JobForecaster(Protocol):
    """Learns how long jobs take, and says how long one will."""

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        """Seconds from its start to its end on the server as it is now, nothing before it. Never raises."""
        ...

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        """A job took so long on the server as it was when it came there; `nodes` are the seconds of those that ran,
        empty where the server did not tell."""
        ...


class NodeForecaster:
    """The sum of what the nodes cost that are not cached (see `NodeCosts`), and of what a job takes beside them.

    A load of weights that are not in memory is another node than one of weights that are. Where a server does not tell
    what its nodes took, each is taken for its share of the job.
    """

    def __init__(self, costs: NodeCosts | None = None) -> None:
        self._costs = costs or NodeCosts()

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        return self._costs.forecast(server.name, [*_to_run(facts, server), _REST])

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        if not (math.isfinite(seconds) and seconds > 0.0):
            return
        expected = [(work, self._costs.seconds(server.name, work)) for work in (*_to_run(facts, server), _REST)]
        expected_s = sum(each_s for _, each_s in expected)
        if nodes:
            seen = [(_on(facts.nodes[key], server), took_s) for key, took_s in nodes.items() if key in facts.nodes]
            seen.append((_REST, max(0.0, seconds - sum(nodes.values()))))
        else:
            seen = [(work, each_s * seconds / max(expected_s, 1e-6)) for work, each_s in expected]
        for work, took_s in seen:
            if work.model and not work.amounts:  # weights that are thought to be away may be there: no load is free
                took_s = max(took_s, _LOAD_FALL * self._costs.seconds(server.name, work))
            self._costs.observe(server.name, work, took_s)
        self._costs.observe_graph(server.name, expected_s, seconds)


def _to_run(facts: JobFacts, server: ServerState) -> Iterator[NodeWork]:
    return (_on(node, server) for node in facts.nodes.values() if node.signature not in server.cached)


def _on(node: NodeFacts, server: ServerState) -> NodeWork:
    """The work of a node on the server as it is: of one that only loads what is in memory, that of any other node."""
    work = node.work
    if not node.loads or work.amounts or node.loads - server.resident.keys():
        return work
    return msgspec.structs.replace(work, class_type=f"{work.class_type} {work.model}", model="")

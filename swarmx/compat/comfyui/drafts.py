"""Drafts of a graph in parts: what each piece runs, when it can begin, and where it comes apart further. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from swarmx.compat.comfyui.forecasts import JobFacts, ServerState
from swarmx.compat.comfyui.graph import Graph, link_of, links, signatures, with_inputs
from swarmx.compat.comfyui.jobs import Job
from swarmx.core.forecast import Forecast

_SAVE, _LOAD = "swarmx-save-", "swarmx-load-"

Cut = tuple[str, int]
"""The output of a node whose latent one piece saves, and others load."""
Able = Callable[[Graph, frozenset[tuple[str, str]]], Collection[str]]


def save_id(latent: int) -> str:
    """The id of the node that saves this latent, by number."""
    return f"{_SAVE}{latent}"


def load_id(latent: int) -> str:
    """The id of the node that loads this latent."""
    return f"{_LOAD}{latent}"


def is_ours(node_id: str) -> bool:
    """Whether the node saves or loads a latent in a part of a graph."""
    return node_id.startswith((_SAVE, _LOAD))


def saving(graph: Graph, cuts: Mapping[int, Cut]) -> Graph:
    """The graph with nodes that save these latents, by number."""
    return graph | {
        save_id(latent): {
            "class_type": "SaveLatent",
            "inputs": {"samples": list(cut), "filename_prefix": "swarmx/latent"},
        }
        for latent, cut in cuts.items()
    }


def loading(graph: Graph, cuts: Mapping[int, Cut]) -> Graph:
    """The graph with nodes that load these latents, in the place of what makes them."""
    latents = {cut: latent for latent, cut in cuts.items()}
    changes: dict[tuple[str, str], object] = {
        (node_id, name): [load_id(latents[link]), 0]
        for node_id, node in graph.items()
        for name, value in node["inputs"].items()
        if (link := link_of(value)) is not None and link in latents
    }
    loaders = {load_id(n): {"class_type": "LoadLatent", "inputs": {"latent": "swarmx.latent"}} for n in cuts}
    return with_inputs(graph, changes) | loaders


def joined(graph: Graph, cuts: Mapping[int, Cut]) -> Graph:
    """The graph with what makes these latents in the place of the nodes that load them, as before `loading`."""
    made = {load_id(latent): cut for latent, cut in cuts.items()}
    return with_inputs(
        graph,
        {
            (node_id, name): list(made[link[0]])
            for node_id, node in graph.items()
            for name, value in node["inputs"].items()
            if (link := link_of(value)) is not None and link[0] in made
        },
    )


def facts_of(job: Job) -> JobFacts:
    """What a forecast may know of a job. All parts of all jobs load a latent under the same name until it is on their
    server: here each has a name that is the same where the same was computed."""
    if job.part is None:
        return JobFacts.of(job.graph, job.outputs)
    cuts, whole = job.part.cuts, joined(job.graph, job.part.cuts)
    made = signatures(whole, [node_id for node_id, _ in cuts.values()])
    names: dict[tuple[str, str], object] = {
        (load_id(latent), "latent"): f"{made[node_id]} {output}" for latent, (node_id, output) in cuts.items()
    }
    return JobFacts.of(with_inputs(job.graph, names), job.outputs, whole)


class Piece(NamedTuple):
    """A part in a draft: the outputs of the graph that it makes on its server, the latents that it loads, and those
    that it saves."""

    outputs: tuple[str, ...]
    server: str
    needs: frozenset[Cut] = frozenset()
    makes: frozenset[Cut] = frozenset()


class PlannedPart(msgspec.Struct, frozen=True, kw_only=True):
    """`outputs` of the graph that the part makes, the numbers of the latents that it loads and saves, and the server
    and seconds, from `starts_s` on, that it was thought to take."""

    outputs: tuple[str, ...]
    server: str
    starts_s: float
    seconds: float
    needs: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()

    @property
    def ends_s(self) -> float:
        return self.starts_s + self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The servers that a graph may be split over, as they are now: their states, and seconds until each is free.

    `waiting` jobs stand behind this one, for `up` servers; a latent takes `transfer_s` from one to another.
    """

    states: Mapping[str, ServerState]
    free_in_s: Mapping[str, float]
    waiting: int
    up: int
    transfer_s: float


@dataclass(slots=True)
class Drafts:
    """Drafts of one job on a fleet, for the latents at which it may be cut. What was forecast once is kept."""

    job: Job
    facts: JobFacts
    fleet: Fleet
    forecast: Callable[[JobFacts, ServerState], Forecast]
    able: Able
    cuts: Sequence[Cut]
    _seconds: dict[tuple[frozenset[str], str], float] = field(default_factory=dict)
    _above: dict[tuple[frozenset[Cut], tuple[str, ...]], tuple[frozenset[str], frozenset[Cut]]] = field(
        default_factory=dict
    )
    _links: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    _able: dict[tuple[bool, bool], Collection[str]] = field(default_factory=dict)

    def parts(self, pieces: Sequence[Piece]) -> tuple[PlannedPart, ...]:
        """What the pieces come to in time. Each stands behind those whose latents it loads."""
        ready_s: dict[Cut, float] = {}
        found = []
        for piece in pieces:
            starts_s = max([self.fleet.free_in_s[piece.server], *(ready_s[cut] for cut in piece.needs)])
            for cut in piece.makes:
                nodes, _ = self._run(piece.needs, [cut[0]])
                ready_s[cut] = starts_s + self.seconds(nodes, piece.server) + self.fleet.transfer_s
            nodes, _ = self._run(piece.needs, _targets(piece))
            found.append(
                PlannedPart(
                    outputs=piece.outputs,
                    server=piece.server,
                    starts_s=starts_s,
                    seconds=self.seconds(nodes, piece.server),
                    needs=self._numbers(piece.needs),
                    makes=self._numbers(piece.makes),
                )
            )
        return tuple(found)

    def seconds(self, nodes: frozenset[str], server: str) -> float:
        """What these nodes should take there."""
        key = nodes, server
        if key not in self._seconds:
            self._seconds[key] = self.forecast(self.facts.only(nodes), self.fleet.states[server]).mean
        return self._seconds[key]

    def further(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """The same with one piece in two, behind a latent: some of what it makes with that goes to a server that has
        none yet."""
        if not self.cuts:
            return
        others = self.fleet.states.keys() - {piece.server for piece in pieces}
        servers = [name for name in sorted(others) if name in self._may(saves=False, loads=True)]
        if not servers:
            return
        for number, piece in enumerate(pieces):
            if piece.server not in self._may(saves=True, loads=bool(piece.needs)):
                continue
            for kept, moved in self._halves(piece):
                for server in servers:
                    if not moved.makes or server in self._may(saves=True, loads=True):
                        yield [*pieces[:number], kept, moved._replace(server=server), *pieces[number + 1 :]]

    def _halves(self, piece: Piece) -> Iterator[tuple[Piece, Piece]]:
        nodes, _ = self._run(piece.needs, _targets(piece))
        inside = [cut for cut in self.cuts if cut in piece.needs or cut[0] in nodes]
        goals: list[str | Cut] = [*piece.outputs, *sorted(piece.makes)]
        for cut in inside:
            needy = [goal for goal in goals if goal != cut and self._needs(piece, goal, cut)]
            for moved in dict.fromkeys([tuple(needy), *((goal,) for goal in needy)]):
                if not moved or (cut in piece.needs and len(moved) == len(goals)):  # nothing would be left
                    continue
                kept = [goal for goal in goals if goal not in moved] + [cut] * (cut not in piece.needs)
                yield self._piece(piece, kept, piece.needs), self._piece(piece, moved, piece.needs | {cut})

    def _needs(self, piece: Piece, goal: str | Cut, cut: Cut) -> bool:
        nodes, loaded = self._run(piece.needs, [goal if isinstance(goal, str) else goal[0]])
        return cut in loaded or (cut not in piece.needs and cut[0] in nodes)

    def _piece(self, of: Piece, goals: Iterable[str | Cut], needs: frozenset[Cut]) -> Piece:
        wanted = frozenset(goals)
        made = Piece(
            outputs=tuple(output for output in self.job.outputs if output in wanted),
            server=of.server,
            makes=frozenset(goal for goal in wanted if not isinstance(goal, str)),
        )
        return made._replace(needs=self._run(needs, _targets(made))[1])

    def _run(self, needs: frozenset[Cut], targets: Sequence[str]) -> tuple[frozenset[str], frozenset[Cut]]:
        """The nodes that run for these targets where some latents can be loaded, and which of those are."""
        key = needs, tuple(targets)
        if key not in self._above:
            nodes, loaded, rest = set[str](), set[Cut](), list(targets)
            while rest:
                node_id = rest.pop()
                if node_id in nodes:
                    continue
                nodes.add(node_id)
                if node_id not in self._links:
                    self._links[node_id] = tuple(links(self.job.graph, node_id))
                for link in self._links[node_id]:
                    if link in needs:
                        loaded.add(link)
                    else:
                        rest.append(link[0])
            self._above[key] = frozenset(nodes), frozenset(loaded)
        return self._above[key]

    def _may(self, *, saves: bool, loads: bool) -> Collection[str]:
        """Servers that have all that the graph needs with such nodes in it: any cut is as good."""
        key = saves, loads
        if key not in self._able:
            graph, files, one = self.job.needed, self.job.files, {0: self.cuts[0]}
            if loads:
                graph, files = loading(graph, one), files | {(load_id(0), "latent")}
            self._able[key] = self.able(saving(graph, one) if saves else graph, files)
        return self._able[key]

    def _numbers(self, cuts: frozenset[Cut]) -> tuple[int, ...]:
        return tuple(sorted(self.cuts.index(cut) for cut in cuts))


def _targets(piece: Piece) -> list[str]:
    return [*piece.outputs, *(cut[0] for cut in sorted(piece.makes))]

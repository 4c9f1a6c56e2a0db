"""Whether a graph is worth running in parts on several servers, and in which parts. Pure.

A graph comes apart in two ways that leave its pictures as they are. Outputs need each other's nodes only where they
share some, which every part runs for itself. And a latent that a sampler made can be saved on one server and loaded on
another, where what needs it goes on: the file holds the tensor as it is.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from swarmx.compat.comfyui.forecasts import JobFacts, ServerState
from swarmx.compat.comfyui.graph import Graph, link_of, upstream_first, with_inputs
from swarmx.compat.comfyui.jobs import Job, PartOf
from swarmx.compat.comfyui.nodes import NodeSpec
from swarmx.core.forecast import Forecast

SAVE, LOAD = "swarmx-save", "swarmx-load"
"""The ids of the nodes that save and load a latent in parts of a graph."""
LEAST_GAIN_S, LEAST_GAIN = 0.25, 0.1  # seconds, and share of what the whole would take: forecasts are not exact
_LEAST_PRICE = 0.1  # of a second of extra work, in seconds that the job gains
_MOST_NODES, _MOST_OUTPUTS, _MOST_SERVERS, _MOST_CUTS = 200, 6, 4, 4

# Output nodes that do nothing but leave files for their own client.
_OUTPUTS = (
    *("SaveImage", "PreviewImage", "SaveLatent", "SaveAnimatedWEBP", "SaveAnimatedPNG", "SaveWEBM", "SaveVideo"),
    *("SaveAudio", "SaveAudioMP3", "SaveAudioOpus", "PreviewAudio"),
)
# A latent is a dictionary. Samplers hand on what is in it beside the tensor, and a file holds the tensor alone: these
# are the nodes whose latents are nothing but a tensor, if those that they get are.
_SAMPLERS = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"})
_PLAIN = _SAMPLERS | {
    *("EmptyLatentImage", "EmptySD3LatentImage", "VAEEncode", "VAEEncodeTiled", "LatentUpscale", "LatentUpscaleBy"),
    "LoadLatent",
}


class PlannedPart(msgspec.Struct, frozen=True, kw_only=True):
    """`outputs` of the graph that the part makes, and the server and seconds, from `starts_s` on, that it was thought
    to take."""

    outputs: tuple[str, ...]
    server: str
    starts_s: float
    seconds: float

    @property
    def ends_s(self) -> float:
        return self.starts_s + self.seconds


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A graph in parts. With a `cut`, the node and its output whose latent the first part saves and the second loads.

    `whole_s` is what the graph would have taken in one piece, from the same moment on.
    """

    parts: tuple[PlannedPart, ...]
    whole_s: float
    cut: tuple[str, int] | None = None

    @property
    def seconds(self) -> float:
        return max(part.ends_s for part in self.parts)

    @property
    def gain_s(self) -> float:
        return self.whole_s - self.seconds

    @property
    def extra_s(self) -> float:
        """Seconds of servers beyond those of the whole: nodes that run twice, models that are loaded twice."""
        return sum(part.seconds for part in self.parts) - self.whole_s

    @property
    def explanation(self) -> str:
        where = "; ".join(
            f"{', '.join(part.outputs) or 'the latent'} on {part.server} in {part.seconds:.2g} s" for part in self.parts
        )
        at = "" if self.cut is None else f", cut behind the node {self.cut[0]}"
        return (
            f"split into {len(self.parts)} parts{at}: {self.seconds:.2g} s expected instead of {self.whole_s:.2g} s, "
            f"for {self.extra_s:+.2g} s of work ({where})"
        )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitter:
    """Plans parts. `told` are patterns of further classes that may be in them: custom nodes, and outputs that are not
    known to leave files only. `able` says which servers have all that a graph needs, but for its files."""

    specs: Callable[[], Mapping[str, NodeSpec]]
    able: Callable[[Graph, frozenset[tuple[str, str]]], Collection[str]]
    forecast: Callable[[JobFacts, ServerState], Forecast]
    told: Sequence[str] = ()

    def plan(self, job: Job, facts: JobFacts, server: str, fleet: Fleet) -> Plan | None:
        """The best way to run the job in parts, the first of them on `server`; None where the whole is better.

        What a split costs others counts: each of those that wait is held up by the extra work, shared by all servers.
        With nobody waiting, somebody may come.
        """
        if len(fleet.states) < 2 or not self.may_split(job.graph, job.outputs):
            return None
        whole_s = self.forecast(facts, fleet.states[server]).mean
        if whole_s <= LEAST_GAIN_S:
            return None
        plans = [
            *self._by_outputs(job, facts, server, fleet, whole_s),
            *self._by_cut(job, facts, server, fleet, whole_s),
        ]
        price = max(fleet.waiting / max(1, fleet.up), _LEAST_PRICE)
        best = max(plans, key=lambda plan: plan.gain_s - price * plan.extra_s, default=None)
        if best is None or best.gain_s < max(LEAST_GAIN_S, LEAST_GAIN * whole_s):
            return None
        return best if best.gain_s > price * best.extra_s else None

    def may_split(self, graph: Graph, outputs: Sequence[str]) -> bool:
        """Whether every node that runs is known to do nothing but compute, and every output to leave files only.

        An output that another one needs would be made twice: such graphs stay whole.
        """
        order = upstream_first(graph, outputs)
        if len(order) > _MOST_NODES or len(outputs) > _MOST_OUTPUTS:
            return False
        specs = self.specs()
        for node_id in order:
            name = graph[node_id]["class_type"]
            spec = specs.get(name)
            if spec is None:
                return False
            if self._is_told(name):
                continue
            if not spec.core or (spec.is_output and (name not in _OUTPUTS or node_id not in outputs)):
                return False
        return not any(link in outputs for node_id in order for link, _ in _links(graph, node_id))

    def _is_told(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.told)

    def _by_outputs(self, job: Job, facts: JobFacts, first: str, fleet: Fleet, whole_s: float) -> Iterator[Plan]:
        """Outputs, longest first, each to the server where all are done soonest with it."""
        if len(job.outputs) < 2:
            return
        idle = [name for name in fleet.states if name != first and not fleet.free_in_s[name]]
        servers = [first, *idle][:_MOST_SERVERS]
        above = {output: frozenset(upstream_first(job.graph, [output])) for output in job.outputs}
        state = fleet.states[first]
        alone = {output: self.forecast(facts.only(above[output]), state).mean for output in job.outputs}
        given: dict[str, list[str]] = {name: [] for name in servers}
        seconds = dict.fromkeys(servers, 0.0)
        for output in sorted(job.outputs, key=lambda output: (-alone[output], output)):
            with_it = {}
            for name in servers:
                nodes = frozenset[str]().union(*(above[each] for each in (*given[name], output)))
                with_it[name] = self.forecast(facts.only(nodes), fleet.states[name]).mean
            chosen = min(
                servers,
                key=lambda name: (max([with_it[name], *(seconds[o] for o in servers if o != name)]), with_it[name]),
            )
            given[chosen].append(output)
            seconds[chosen] = with_it[chosen]
        parts = tuple(
            PlannedPart(outputs=_in_order(job, given[name]), server=name, starts_s=0.0, seconds=seconds[name])
            for name in servers
            if given[name]
        )
        if len(parts) > 1:
            yield Plan(parts=parts, whole_s=whole_s)

    def _by_cut(self, job: Job, facts: JobFacts, first: str, fleet: Fleet, whole_s: float) -> Iterator[Plan]:
        """What makes a latent, and what else is wanted, on `first`; some or all of what needs it on another server."""
        if SAVE in job.graph or LOAD in job.graph:
            return
        for cut in self._cuts(job):
            before, after = saving(job.graph, cut), loading(job.graph, cut)
            others = [
                n for n in sorted(self.able(after, job.files | {(LOAD, "latent")})) if n in fleet.states and n != first
            ]
            if not others or first not in self.able(before, job.files):
                continue
            made = frozenset(upstream_first(job.graph, [cut[0]]))
            made_s = self.forecast(facts.only(made), fleet.states[first]).mean
            needy = [o for o in job.outputs if cut[0] in upstream_first(job.graph, [o])]
            for moved in {tuple(needy), *((output,) for output in needy)}:
                kept = tuple(output for output in job.outputs if output not in moved)
                nodes = made | frozenset(upstream_first(job.graph, kept))
                kept_s = self.forecast(facts.only(nodes), fleet.states[first]).mean
                rest = frozenset(upstream_first(after, moved)) - {LOAD}
                for name in others:
                    parts = (
                        PlannedPart(outputs=kept, server=first, starts_s=0.0, seconds=kept_s),
                        PlannedPart(
                            outputs=moved,
                            server=name,
                            starts_s=max(made_s + fleet.transfer_s, fleet.free_in_s[name]),
                            seconds=self.forecast(facts.only(rest), fleet.states[name]).mean,
                        ),
                    )
                    yield Plan(parts=parts, whole_s=whole_s, cut=cut)

    def _cuts(self, job: Job) -> list[tuple[str, int]]:
        """Outputs of samplers that are latents without anything beside the tensor, those that most needs first."""
        found: dict[tuple[str, int], None] = {}
        for node_id in reversed(upstream_first(job.graph, job.outputs)):
            for source, number in _links(job.graph, node_id):
                if job.graph[source]["class_type"] in _SAMPLERS and self._is_plain(job.graph, source, number):
                    found[source, number] = None
        return list(found)[:_MOST_CUTS]

    def _is_plain(self, graph: Graph, node_id: str, number: int) -> bool:
        """Whether this output is a latent that went through nodes only which put nothing into it but the tensor."""
        specs, seen, rest = self.specs(), set[str](), [(node_id, number)]
        while rest:
            at, output = rest.pop()
            spec = specs.get(graph[at]["class_type"])
            if spec is None or output >= len(spec.outputs) or spec.outputs[output] != "LATENT":
                if at == node_id:
                    return False
                continue  # what makes no latent hands none on
            if graph[at]["class_type"] not in _PLAIN:
                return False
            if at not in seen:
                seen.add(at)
                rest += _links(graph, at)
        return True


def saving(graph: Graph, cut: tuple[str, int]) -> Graph:
    """The graph with a node that saves the latent."""
    node = {"class_type": "SaveLatent", "inputs": {"samples": list(cut), "filename_prefix": "swarmx/latent"}}
    return {**graph, SAVE: node}


def loading(graph: Graph, cut: tuple[str, int]) -> Graph:
    """The graph with a node that loads the latent, in the place of what makes it."""
    changes: dict[tuple[str, str], object] = {
        (node_id, name): [LOAD, 0]
        for node_id, node in graph.items()
        for name, value in node["inputs"].items()
        if link_of(value) == cut
    }
    return {**with_inputs(graph, changes), LOAD: {"class_type": "LoadLatent", "inputs": {"latent": "swarmx.latent"}}}


def part_jobs(job: Job, plan: Plan) -> list[Job]:
    """The jobs of the parts, with ids that follow from the job's.

    Each has the whole graph and runs what its own outputs need: pictures carry the graph that made them, and that is
    the one that was sent, but for the nodes at a cut.
    """
    found = []
    for number, part in enumerate(plan.parts):
        graph, outputs, files = job.graph, part.outputs, job.files
        saves, loads = plan.cut is not None and number == 0, plan.cut is not None and number == 1
        if plan.cut is not None and saves:
            graph, outputs = saving(graph, plan.cut), (*outputs, SAVE)
        if plan.cut is not None and loads:
            graph, files = loading(graph, plan.cut), files | {(LOAD, "latent")}
        found.append(
            msgspec.structs.replace(
                job,
                prompt_id=str(uuid.uuid5(uuid.UUID(job.prompt_id), str(number))),
                graph=graph,
                outputs=outputs,
                targets=list(outputs),
                files=files,
                part=PartOf(of=job.prompt_id, number=number, saves=saves, loads=loads),
            )
        )
    return found


def _in_order(job: Job, outputs: Iterable[str]) -> tuple[str, ...]:
    wanted = set(outputs)
    return tuple(output for output in job.outputs if output in wanted)


def _links(graph: Graph, node_id: str) -> Iterator[tuple[str, int]]:
    for value in graph[node_id]["inputs"].values():
        link = link_of(value)
        if link is not None and link[0] in graph:
            yield link

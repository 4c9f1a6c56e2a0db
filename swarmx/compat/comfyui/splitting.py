"""Whether a graph is worth running in parts on several servers, and in which parts. Pure.

A graph comes apart in two ways that leave its pictures as they are. Outputs need each other's nodes only where they
share some, which every part runs for itself. And latents that samplers made can be saved on one server and loaded on
others, where what needs them goes on: the file holds the tensor as it is.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from swarmx.compat.comfyui.drafts import (
    Able,
    Cut,
    Drafts,
    Fleet,
    Piece,
    PlannedPart,
    is_ours,
    load_id,
    loading,
    save_id,
    saving,
)
from swarmx.compat.comfyui.forecasts import JobFacts, ServerState
from swarmx.compat.comfyui.graph import Graph, links, upstream_first
from swarmx.compat.comfyui.jobs import Job, PartOf
from swarmx.compat.comfyui.nodes import NodeSpec
from swarmx.core.forecast import Forecast

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


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A graph in parts, each behind those whose latents it loads; `cuts` are where these latents come from, by number.

    `whole_s` is what the graph would have taken in one piece, from the same moment on.
    """

    parts: tuple[PlannedPart, ...]
    whole_s: float
    cuts: dict[int, Cut] = {}

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

    def worth_s(self, price: float) -> float:
        """Seconds that the job gains, less those that the others lose: `price` for each second of extra work."""
        return self.gain_s - price * self.extra_s

    @property
    def explanation(self) -> str:
        where = "; ".join(
            f"{', '.join(part.outputs) or 'the latent'} on {part.server} in {part.seconds:.2g} s" for part in self.parts
        )
        behind = [node_id for node_id, _ in self.cuts.values()]
        at = f", cut behind the node{'s' if len(behind) > 1 else ''} {' and '.join(behind)}" if behind else ""
        return (
            f"split into {len(self.parts)} parts{at}: {self.seconds:.2g} s expected instead of {self.whole_s:.2g} s, "
            f"for {self.extra_s:+.2g} s of work ({where})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitter:
    """Plans parts. `told` are patterns of further classes that may be in them: custom nodes, and outputs that are not
    known to leave files only. `able` says which servers have all that a graph needs, but for its files."""

    specs: Callable[[], Mapping[str, NodeSpec]]
    able: Able
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
        price = max(fleet.waiting / max(1, fleet.up), _LEAST_PRICE)
        drafts = Drafts(job, facts, fleet, self.forecast, self.able, self._cuts(job))
        starts = [[Piece(job.outputs, server)], *self._by_outputs(job, drafts, server)]
        plans = [plan for start in starts if (plan := self._cut_up(drafts, start, whole_s, price)) is not None]
        best = max(plans, key=lambda plan: plan.worth_s(price), default=None)
        if best is None or best.gain_s < max(LEAST_GAIN_S, LEAST_GAIN * whole_s):
            return None
        return best if best.worth_s(price) > 0.0 else None

    def _cut_up(self, drafts: Drafts, start: list[Piece], whole_s: float, price: float) -> Plan | None:
        """The draft with as many cuts as pay, the best one first; None where it stays in one piece."""

        def planned(pieces: Sequence[Piece]) -> Plan:
            used = {number: cut for number, cut in enumerate(drafts.cuts) if any(cut in p.makes for p in pieces)}
            return Plan(parts=drafts.parts(pieces), whole_s=whole_s, cuts=used)

        pieces, plan = start, planned(start) if len(start) > 1 else None
        while len(pieces) < _MOST_SERVERS:
            least_s = 0.0 if plan is None else plan.worth_s(price) + LEAST_GAIN_S
            found = max(
                ((planned(further), further) for further in drafts.further(pieces)),
                key=lambda pair: pair[0].worth_s(price),
                default=None,
            )
            if found is None or found[0].worth_s(price) <= least_s:
                break
            plan, pieces = found
        return plan

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
        return not any(link in outputs for node_id in order for link, _ in links(graph, node_id))

    def _is_told(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.told)

    def _by_outputs(self, job: Job, drafts: Drafts, first: str) -> Iterator[list[Piece]]:
        """Outputs, longest first, each to the server where all are done soonest with it."""
        if len(job.outputs) < 2:
            return
        fleet = drafts.fleet
        idle = [name for name in fleet.states if name != first and not fleet.free_in_s[name]]
        servers = [first, *idle][:_MOST_SERVERS]
        above = {output: frozenset(upstream_first(job.graph, [output])) for output in job.outputs}
        alone = {output: drafts.seconds(above[output], first) for output in job.outputs}
        given: dict[str, list[str]] = {name: [] for name in servers}
        seconds = dict.fromkeys(servers, 0.0)
        for output in sorted(job.outputs, key=lambda output: (-alone[output], output)):
            with_it = {
                name: drafts.seconds(frozenset[str]().union(*(above[each] for each in (*given[name], output))), name)
                for name in servers
            }
            chosen = min(
                servers,
                key=lambda name: (max([with_it[name], *(seconds[o] for o in servers if o != name)]), with_it[name]),
            )
            given[chosen].append(output)
            seconds[chosen] = with_it[chosen]
        pieces = [Piece(_in_order(job, given[name]), name) for name in servers if given[name]]
        if len(pieces) > 1:
            yield pieces

    def _cuts(self, job: Job) -> list[Cut]:
        """Outputs of samplers that are latents without anything beside the tensor, those that most needs first."""
        if any(map(is_ours, job.graph)):
            return []
        found: dict[Cut, None] = {}
        for node_id in reversed(upstream_first(job.graph, job.outputs)):
            for source, number in links(job.graph, node_id):
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
                rest += links(graph, at)
        return True


def part_jobs(job: Job, plan: Plan) -> list[Job]:
    """The jobs of the parts, with ids that no client can guess, and take for a job of its own.

    Each has all that the job needs and runs what its own outputs need: pictures carry the graph that made them, and
    that is the whole one, but for the nodes at a cut.
    """
    found, whole = [], job.needed
    for number, part in enumerate(plan.parts):
        needed = {latent: plan.cuts[latent] for latent in part.needs}
        graph = loading(whole, needed) if needed else whole
        graph = saving(graph, {latent: plan.cuts[latent] for latent in part.makes})
        outputs = (*part.outputs, *map(save_id, part.makes))
        found.append(
            msgspec.structs.replace(
                job,
                prompt_id=str(uuid.uuid4()),
                graph=graph,
                outputs=outputs,
                files=frozenset(file for file in job.files if file[0] in whole)
                | {(load_id(latent), "latent") for latent in needed},
                part=PartOf(of=job.prompt_id, number=number, makes=part.makes, needs=part.needs, cuts=needed),
            )
        )
    return found


def _in_order(job: Job, outputs: Iterable[str]) -> tuple[str, ...]:
    wanted = set(outputs)
    return tuple(output for output in job.outputs if output in wanted)

"""How long a job will take on a server: the port, and a forecaster that counts evaluations and pixels.

A server's state is a feature: what it has in memory need not be loaded, and what it computed for its last job need not
be computed again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Protocol

from swarmx.compat.comfyui.graph import Graph, models_in, signatures
from swarmx.core.forecast import LEVELS, Forecast
from swarmx.neural.heads.comfy_graph import graph_key, read_graph
from swarmx.neural.heads.images import ImageHistory

# Evaluations of the network in one step: samplers of second order need two (`k-diffusion`, Karras et al. 2022).
_TWICE = ("heun", "dpm_2", "dpmpp_2s", "dpmpp_sde", "seeds_2", "sa_solver_pece")
_THRICE = ("seeds_3",)
_SCORES = tuple(NormalDist().inv_cdf(level) for level in LEVELS)
_RESIDENT = 3  # models that a server is taken to keep
_BASE_S, _NODE_S, _LOAD_S, _MEGAPIXEL_S = 0.05, 0.005, 5.0, 0.05
_FIRST_SPREAD = 0.8  # of the logarithm, before anything was seen
_MEMORY = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What a forecast may know of a job: read once, when it is accepted.

    `work` is what its samplers evaluate, in evaluations x megapixels x pictures; `signatures` name what its nodes
    compute, in which `sampling` are the samplers'.
    """

    key: str
    nodes: int
    work: float
    models: frozenset[str]
    signatures: frozenset[str]
    sampling: frozenset[str]

    @classmethod
    def of(cls, graph: Graph, outputs: tuple[str, ...]) -> JobFacts:
        """Read a valid graph."""
        job, names = read_graph(graph), signatures(graph, outputs)
        samplers = [node_id for node_id in names if _is_sampler(graph[node_id]["class_type"])]
        work = job.work if math.isfinite(job.work) else float(job.samplers)
        return cls(
            key=graph_key(graph),
            nodes=len(names),
            work=work * _evaluations(graph, samplers),
            models=models_in(graph),
            signatures=frozenset(names.values()),
            sampling=frozenset(names[node_id] for node_id in samplers),
        )


@dataclass(slots=True, kw_only=True)
class ServerState:
    """What the front knows of a server's memory: the models that it ran last, and what its last job computed."""

    name: str
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    cached: frozenset[str] = frozenset()

    def ran(self, facts: JobFacts) -> None:
        """The server has done a job."""
        for model in facts.models:
            self.resident[model] = None
            self.resident.move_to_end(model)
        while len(self.resident) > max(_RESIDENT, len(facts.models)):
            self.resident.popitem(last=False)
        self.cached = facts.signatures

    def forget(self) -> None:
        """The server has started anew, or was told to free its memory."""
        self.resident.clear()
        self.cached = frozenset()

    def to_load(self, facts: JobFacts) -> AbstractSet[str]:
        """The models of a job that it has to load first."""
        return facts.models - self.resident.keys()


class JobForecaster(Protocol):
    """Learns how long jobs take, and says how long one will."""

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        """Seconds from its start to its end on the server as it is now, nothing before it. Never raises."""
        ...

    def ended(self, facts: JobFacts, server: ServerState, seconds: float) -> None:
        """A job took so long on the server as it was when it came there."""
        ...


class EvaluationForecaster:
    """Evaluations x pixels, corrected by running means: of all jobs, of the graph, of the server.

    Lognormal around that, as wide as the last forecasts were wrong. Loads of models have a running mean of their own.
    """

    def __init__(self) -> None:
        self._history = ImageHistory()
        self._variance = _FIRST_SPREAD**2
        self._load_s: dict[str, float] = {}

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        middle = self._warm_s(facts, server) + self._loading_s(facts, server)
        spread = math.sqrt(self._variance)
        return Forecast(
            levels=LEVELS,
            quantiles=tuple(middle * math.exp(spread * score) for score in _SCORES),
            unit="s",
            source="empirical",
            version="evaluations",
        )

    def ended(self, facts: JobFacts, server: ServerState, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0.0):
            return
        warm_s, loading = self._warm_s(facts, server), server.to_load(facts)
        if loading:  # what is beyond the rest is the loading; of several, each its part
            known = self._load_s.get(server.name, _LOAD_S)
            seen = max(0.0, seconds - warm_s) / len(loading)
            self._load_s[server.name] = seen if server.name not in self._load_s else known + 0.3 * (seen - known)
            return
        error = math.log(seconds / max(1e-6, warm_s))
        self._variance += _MEMORY * (min(4.0, error * error) - self._variance)
        estimate = _estimate_s(facts, server)
        self._history.observe(_key(facts, server), server.name, math.log(seconds / estimate))

    def _warm_s(self, facts: JobFacts, server: ServerState) -> float:
        factors = self._history.factors(_key(facts, server), server.name)
        return _estimate_s(facts, server) * math.exp(factors.overall + factors.graph + factors.device)

    def _loading_s(self, facts: JobFacts, server: ServerState) -> float:
        return len(server.to_load(facts)) * self._load_s.get(server.name, _LOAD_S)


def _estimate_s(facts: JobFacts, server: ServerState) -> float:
    fresh = facts.signatures - server.cached
    share = len(facts.sampling - server.cached) / len(facts.sampling) if facts.sampling else 0.0
    return _BASE_S + _NODE_S * len(fresh) + _MEGAPIXEL_S * facts.work * share


def _key(facts: JobFacts, server: ServerState) -> str:
    """Graphs that cost the same; one whose samplers need not run again is another one."""
    return facts.key if not facts.sampling or facts.sampling - server.cached else f"{facts.key} cached"


def _is_sampler(class_type: str) -> bool:
    lowered = class_type.lower()
    return "sampler" in lowered and "select" not in lowered


def _evaluations(graph: Graph, samplers: list[str]) -> float:
    """Evaluations of the network a step: the mean over the samplers of order x 2 where there is guidance."""
    counts = [_order(graph, node_id) * _guidance(graph, node_id) for node_id in samplers]
    return sum(counts) / len(counts) if counts else 1.0


def _order(graph: Graph, node_id: str) -> float:
    name = graph[node_id]["inputs"].get("sampler_name")
    if not isinstance(name, str):
        return 1.0
    return 3.0 if name.startswith(_THRICE) else 2.0 if name.startswith(_TWICE) else 1.0


def _guidance(graph: Graph, node_id: str) -> float:
    cfg = graph[node_id]["inputs"].get("cfg")
    return 1.0 if isinstance(cfg, int | float) and cfg == 1.0 else 2.0 if isinstance(cfg, int | float) else 1.0

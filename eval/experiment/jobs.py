"""A job is one simulation with everything that decides its outcome; a run is what is kept of it, one line of JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np

import eval.sim
import eval.workloads
import swarmx
from eval.experiment.bound import bound_s
from eval.experiment.grounds import Grounds, Wanted
from eval.sim.outcome import Outcome
from eval.sim.settings import ForecastName, PathName, SimSettings
from eval.sim.simulate import simulate
from eval.workloads.fleets import fleet, sized
from eval.workloads.plan import Workload
from swarmx.agents.policies import POLICIES
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.engine_order import OrderName
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import Replica

BOUND = "lower_bound"
"""Not a policy: every workflow alone in the system, on the fastest device of each model."""


SIGNAL_EVERY_S = {"llmd_load": 0.1, "llmd_predicted": 0.1}
"""How often policies that live on the engines' counters hear them; llm-d reads them every 50 ms."""

HOLD_LIMIT_S = {"thunderagent": 1800.0}
"""How long a program may be paused in the original; for others as the router has it."""

WARMUP_S, WARMUP_SHARE = 75.0, 0.1
"""How long a system fills up before anybody counts: what the median of the longest kinds takes alone, and in short runs
not more than this share of the time of arrivals."""

_PATIENT_S = 1e6  # nobody is retried for being slow: who binds early would pay for waiting, who binds late would not


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """How many routers there are, and how old is what they hear. As in `SimSettings`."""

    routers: int = 1
    ownership: str = "shared"
    age_s: float = 0.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One policy with its settings on one workload and fleet; `replicas` 0 leaves the fleet as large as it is.

    `targets` are the seconds in which workflows of a kind should end. Those submitted before `warmup_s` are run, but
    not counted.
    """

    workload: Wanted
    fleet: str
    policy: str
    replicas: int = 0
    parameters: dict[str, float] = {}
    late_binding: bool = True
    forecast: ForecastName = "role_means"
    path: PathName = "none"
    order: OrderName = "arrival"
    targets: dict[str, float] = {}
    signals: Signals = Signals()
    warmup_s: float = 0.0


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a job.

    `latency_s` has for each kind one entry a workflow, in the order of submission; None where it was refused. What had
    not ended counts until the end of the run. `sources` has as many for each kind that is drawn from records: equal
    numbers, of other seeds too, are one record (`PlannedWorkflow.source`). `thirds` are mean slowdowns of what arrived
    in each third of the time, none of it left out. `jain_slowdown` is Jain's index of the slowdowns of a kind. `cost`
    is replica seconds x weight.
    """

    key: str
    code: str
    job: Job
    latency_s: dict[str, list[float | None]]
    sources: dict[str, list[int]]
    max_slowdown: dict[str, float]
    jain_slowdown: dict[str, float]
    thirds: dict[str, list[float]]
    jain: float
    cost: float
    hit_ratio: float
    preemptions: int
    unended: int
    refusals: int
    span_s: float
    drained_s: float
    calls: int
    cpu_s: float


def key_of(job: Job, grounds: Grounds) -> str:
    """A name for the job and its data."""
    seen = [msgspec.to_builtins(job), grounds.fingerprint]
    return sha256(msgspec.json.encode(seen, order="deterministic")).hexdigest()[:24]


def warmup_s(wanted: Wanted) -> float:
    """The same for every policy on this workload."""
    return min(WARMUP_S, WARMUP_SHARE * wanted.content.count / wanted.rate_per_s)


def code_of(policy: str) -> str:
    """A hash of all code that decides what comes of a job with this policy: with a change, old runs say nothing."""
    module = POLICIES[policy].__module__.rsplit(".", 1)[1] if policy in POLICIES else ""
    own = "".join(_hash(path) for path in (_ROUTER / "policies").glob("*.py") if path.stem in (module, *_BASES))
    return sha256(f"{_common()}{own}".encode()).hexdigest()[:12]


def run_job(job: Job, grounds: Grounds) -> Run:
    """Do it. Raises ConfigError for a job that makes no sense."""
    workload = grounds.build(job.workload)
    if not workload.workflows or workload.workflows[-1].at_s < job.warmup_s:
        raise ConfigError(f"nothing arrives after the warm-up of {job.warmup_s:g} s; ask for more workflows.")
    if job.policy == BOUND:
        return _bound(job, grounds, workload)
    shared = job.signals.routers > 1 and job.signals.ownership == "shared"
    settings = SimSettings(
        router=RouterSettings(
            policy=job.policy, parameters=job.parameters, seed=job.workload.content.seed, demand_every_s=0.0,
            late_binding=job.late_binding, targets=job.targets, shared=shared, log_decisions=False,
            call_timeout_s=_PATIENT_S, first_token_timeout_s=_PATIENT_S,
            hold_limit_s=HOLD_LIMIT_S.get(job.policy, 60.0),
        ),
        order=job.order,
        stream=True,
        signal_every_s=SIGNAL_EVERY_S.get(job.policy, 1.0),
        forecast=job.forecast,
        path=job.path,
        routers=job.signals.routers,
        ownership=job.signals.ownership,  # type: ignore[arg-type]
        signal_age_s=job.signals.age_s,
    )  # fmt: skip
    replicas = replicas_of(job)
    outcome = simulate(workload, replicas, settings, job.workload.content.seed)
    return _kept(job, grounds, workload, replicas, outcome)


def replicas_of(job: Job) -> list[Replica]:
    """The fleet of a job."""
    return sized(job.fleet, job.replicas) if job.replicas else fleet(job.fleet)


def _kept(job: Job, grounds: Grounds, workload: Workload, replicas: list[Replica], outcome: Outcome) -> Run:
    flows, kinds = outcome.workflows, outcome.kinds
    ends_s = np.where(np.isnan(flows.end_s), outcome.stopped_s, flows.end_s)
    latency_s, slow = ends_s - flows.at_s, (ends_s - flows.at_s) / np.maximum(flows.unloaded_s, 1e-9)
    last_s = float(flows.at_s[-1])
    third = np.minimum(2, flows.at_s * 3.0 / max(last_s, 1e-9)).astype(int)
    rows = _counted(workload, job)
    slowdowns = {kind: slow[of_kind][~flows.refused[of_kind]] for kind, of_kind in rows.items()}
    weight = sum(replica.profile.cost_weight for replica in replicas)
    queried = int(outcome.replicas.query_tokens.sum())
    used = [
        outcome.jain_index(model)
        for model in outcome.models
        if (outcome.replicas.model == outcome.models.index(model)).any()
    ]
    return Run(
        key=key_of(job, grounds),
        code=code_of(job.policy),
        job=job,
        latency_s={
            kind: [None if flows.refused[i] else round(float(latency_s[i]), 4) for i in of_kind]
            for kind, of_kind in rows.items()
        },
        sources=_sources(workload, rows),
        max_slowdown={kind: float(s.max()) if len(s) else 0.0 for kind, s in slowdowns.items()},
        jain_slowdown={kind: jain_index(s) for kind, s in slowdowns.items()},
        thirds={
            kind: [_mean(slow[(third == part) & (flows.kind == kinds.index(kind))]) for part in range(3)]
            for kind in kinds
        },
        jain=float(np.mean(used)),
        cost=weight * outcome.stopped_s,
        hit_ratio=int(outcome.replicas.hit_tokens.sum()) / queried if queried else 0.0,
        preemptions=int(outcome.replicas.preemptions.sum()),
        unended=int(np.isnan(flows.end_s).sum()),
        refusals=sum(int(flows.refused[of_kind].sum()) for of_kind in rows.values()),
        span_s=last_s - job.warmup_s,
        drained_s=outcome.stopped_s - last_s,
        calls=workload.calls,
        cpu_s=outcome.cpu_s,
    )


def _bound(job: Job, grounds: Grounds, workload: Workload) -> Run:
    rows = _counted(workload, job)
    least_s = bound_s(workload, replicas_of(job))
    by_kind: dict[str, list[float | None]] = {
        kind: [round(least_s[i], 4) for i in of_kind] for kind, of_kind in rows.items()
    }
    ones = dict.fromkeys(by_kind, 1.0)
    last_s = workload.workflows[-1].at_s
    return Run(
        key=key_of(job, grounds), code=code_of(job.policy), job=job, latency_s=by_kind,
        sources=_sources(workload, rows), max_slowdown=ones, jain_slowdown=ones,
        thirds={kind: [1.0, 1.0, 1.0] for kind in by_kind}, jain=1.0, cost=0.0, hit_ratio=1.0, preemptions=0,
        unended=0, refusals=0, span_s=last_s - job.warmup_s, drained_s=0.0, calls=workload.calls, cpu_s=0.0,
    )  # fmt: skip


def _counted(workload: Workload, job: Job) -> dict[str, list[int]]:
    """Positions of the workflows that count, by kind; a kind that has none is left out."""
    rows: dict[str, list[int]] = {}
    for position, workflow in enumerate(workload.workflows):
        if workflow.at_s >= job.warmup_s:
            rows.setdefault(workflow.kind, []).append(position)
    return dict(sorted(rows.items()))


def _sources(workload: Workload, rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    found = {kind: [workload.workflows[i].source for i in of_kind] for kind, of_kind in rows.items()}
    return {kind: [s for s in some if s is not None] for kind, some in found.items() if None not in some}


def jain_index(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """1 when all are alike, 1/n when one has it all (Jain et al. 1984)."""
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares > 0.0 else 1.0


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(values.mean()) if len(values) else 1.0


_SWARMX = Path(swarmx.__path__[0])
_ROUTER = _SWARMX / "agents"
_NOT_SEEN = {"training", "__pycache__", "reference"}
_BASES = ("least_work", "weighted_least_outstanding", "serial_view", "trees", "ties")  # what other policies build on


@cache
def _common() -> str:
    """Of the simulator, the workloads and the agents, but for the policies, of which one has a hash by itself."""
    places = [
        Path(eval.sim.__path__[0]),
        Path(eval.workloads.__path__[0]),
        _SWARMX / "core",
        _ROUTER,
        _SWARMX / "neural",
        Path(__file__).parent / "jobs.py",
        Path(__file__).parent / "bound.py",
    ]
    policies = {_ROUTER / "policies" / f"{maker.__module__.rsplit('.', 1)[1]}.py" for maker in POLICIES.values()}
    policies.add(_ROUTER / "policies" / "__init__.py")
    everything = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    found = (path for path in everything if path.is_file())
    return "".join(_hash(path) for path in _decisive(found) if path not in policies)


def _decisive(paths: Iterable[Path]) -> Iterable[Path]:
    return (path for path in paths if not _NOT_SEEN.intersection(path.parts))


@cache
def _hash(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:16]

"""Why a model is slow, or that it is not: causes that its figures show, the heaviest first, each with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from swarmx.core.control import AlertSeen, ControlView, Evidence, ModelStatus, ReplicaStatus, Scalar

_ALERTS_FOR_S = 600.0
_WAIT_SHARE = 0.2  # of the latency: less waiting than this is ordinary
_FAILED_SHARE = 0.02
_KV_FULL = 0.9
_UNEVEN = 3.0  # times the mean of the others
_BUSY = 8.0  # calls at once on each replica
_FASTER = 1.5  # arrivals against those of an earlier plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One thing that makes a model slow. `weight`, from 0 to 1, ranks causes and means nothing else."""

    weight: float
    sentence: str
    evidence: tuple[Evidence, ...]
    advice: str = ""


def causes(model: str, view: ControlView) -> list[Cause]:
    """What the figures show, heaviest first; empty when the model is not slow by any of them."""
    status = view.models[model]
    replicas = [r for r in view.replicas.values() if r.model == model and r.state != "gone"]
    found = [*_capacity(status), *_waiting(status), *_faults(status, replicas, view), *_load(status, replicas, view)]
    return sorted(found, key=lambda cause: cause.weight, reverse=True)


def figures(status: ModelStatus) -> tuple[Evidence, ...]:
    """The numbers that say how a model is, as far as they are known."""
    over = status.window_s
    seen = (
        _seen("p50_s", status.model, status.p50_s, "s", over),
        _seen("p95_s", status.model, status.p95_s, "s", over),
        _seen("wait_p95_s", status.model, status.wait_p95_s, "s", over),
        _seen("arrivals_per_s", status.model, status.arrivals_per_s, "calls/s", over),
        _seen("in_flight", status.model, status.in_flight, "calls"),
        _seen("waiting", status.model, status.waiting, "calls"),
        _seen("ready", status.model, status.ready, "replicas"),
    )
    return tuple(item for item in seen if item.value is not None)


def _seen(metric: str, subject: str, value: Scalar | None, unit: str = "", window_s: float | None = None) -> Evidence:
    return Evidence(metric=metric, subject=subject, value=value, unit=unit, window_s=window_s)


def _capacity(status: ModelStatus) -> Iterator[Cause]:
    name, wanted = status.model, status.wanted
    usual = f", which usually takes {status.start_s:.0f} s" if status.start_s is not None else ""
    if status.ready == 0:
        coming = f"; {status.starting} starting{usual}" if status.starting else ""
        yield Cause(
            weight=1.0,
            sentence=f"No replica is ready{coming}.",
            evidence=(_seen("ready", name, 0, "replicas"), _seen("starting", name, status.starting, "replicas")),
        )
    elif status.starting:
        yield Cause(
            weight=0.3 + 0.5 * status.starting / (status.starting + status.ready),
            sentence=f"{status.starting} of its replicas are still starting{usual}; {status.ready} ready.",
            evidence=(
                _seen("starting", name, status.starting, "replicas"),
                _seen("start_s", name, status.start_s, "s"),
            ),
        )
    if wanted is not None and status.max_replicas is not None and wanted > status.max_replicas:
        higher = status.limit is not None and status.limit > status.max_replicas
        yield Cause(
            weight=0.9,
            sentence=f"It wants {wanted:.1f} replicas, and its bounds allow {status.max_replicas}.",
            evidence=(
                _seen("wanted", name, wanted, "replicas"),
                _seen("max_replicas", name, status.max_replicas, "replicas"),
            ),
            advice=f"set bounds of {name} to {status.min_replicas}..{status.limit}" if higher else "",
        )
    if status.cordoned or status.draining:
        yield Cause(
            weight=0.45,
            sentence=f"{status.cordoned} of its replicas are cordoned, {status.draining} draining: they take no calls.",
            evidence=(
                _seen("cordoned", name, status.cordoned, "replicas"),
                _seen("draining", name, status.draining, "replicas"),
            ),
        )


def _waiting(status: ModelStatus) -> Iterator[Cause]:
    share = status.wait_p95_s / status.p95_s if status.wait_p95_s is not None and status.p95_s else 0.0
    queued = status.waiting / (status.waiting + status.in_flight) if status.waiting else 0.0
    if not status.waiting and share < _WAIT_SHARE:
        return
    text = f"{status.waiting} calls wait in the router now"
    if share >= _WAIT_SHARE:
        text += f"; at P95 a call waited {status.wait_p95_s:.3g} s, and took {status.p95_s:.3g} s in all"
    yield Cause(
        weight=min(0.95, 0.3 + 0.65 * max(min(1.0, share), queued)),
        sentence=text + ".",
        evidence=(
            _seen("waiting", status.model, status.waiting, "calls"),
            _seen("wait_p95_s", status.model, status.wait_p95_s, "s", status.window_s),
            _seen("p95_s", status.model, status.p95_s, "s", status.window_s),
        ),
    )


def _faults(status: ModelStatus, replicas: Sequence[ReplicaStatus], view: ControlView) -> Iterator[Cause]:
    ids = {r.replica_id for r in view.replicas.values() if r.model == status.model}
    for name, alert in _latest(view, {"breaker_opened", "breaker_closed"}).items():
        if name in ids and alert.kind == "breaker_opened":
            yield Cause(
                weight=0.75,
                sentence=f"{name} failed several times in a row and gets no calls for now.",
                evidence=(_seen("breaker_opened", name, round(view.at_s - alert.at_s, 1), "s ago"),),
            )
    for name, alert in _latest(view, {"replica_failed"}).items():
        if name in ids or name == status.model:
            yield Cause(
                weight=0.7,
                sentence=f"{name} did not become ready.",
                evidence=(_seen("replica_failed", name, round(view.at_s - alert.at_s, 1), "s ago"),),
            )
    if status.ended and status.failed / status.ended >= _FAILED_SHARE:
        yield Cause(
            weight=min(1.0, 0.5 + status.failed / status.ended),
            sentence=f"{status.failed} of the {status.ended} calls that ended have failed.",
            evidence=(
                _seen("failed", status.model, status.failed, "calls", status.window_s),
                _seen("ended", status.model, status.ended, "calls", status.window_s),
            ),
        )
    full = [r for r in replicas if r.kv_usage is not None and r.kv_usage >= _KV_FULL]
    if full:
        yield Cause(
            weight=0.6,
            sentence=f"The KV cache of {_names(full)} is nearly full: calls there wait for memory or are pre-empted.",
            evidence=tuple(_seen("kv_usage", r.replica_id, r.kv_usage, "share") for r in full),
        )


def _load(status: ModelStatus, replicas: Sequence[ReplicaStatus], view: ControlView) -> Iterator[Cause]:
    ready = [r for r in replicas if r.state == "ready"]
    if queued := [r for r in ready if r.waiting]:
        yield Cause(
            weight=0.4,
            sentence=f"Calls also wait inside the engine of {_names(queued)}.",
            evidence=tuple(_seen("waiting", r.replica_id, r.waiting, "calls") for r in queued),
        )
    if len(ready) > 1:
        top = max(ready, key=lambda r: r.in_flight)
        others = mean(r.in_flight for r in ready if r is not top)
        if top.in_flight >= 4 and top.in_flight >= _UNEVEN * max(1.0, others):
            yield Cause(
                weight=0.5,
                sentence=f"{top.replica_id} has {top.in_flight} calls, the others {others:.1f} on average.",
                evidence=(_seen("in_flight", top.replica_id, top.in_flight, "calls"),),
            )
    if ready and status.in_flight / len(ready) >= _BUSY:
        yield Cause(
            weight=0.35,
            sentence=f"It is just busy: each ready replica works on {status.in_flight / len(ready):.1f} calls at once.",
            evidence=(_seen("in_flight", status.model, status.in_flight, "calls"),),
        )
    earlier = [p for p in view.plans if p.model == status.model and p.terms.get("arrivals_per_s", 0.0) > 0.0]
    if earlier and status.arrivals_per_s >= _FASTER * earlier[0].terms["arrivals_per_s"]:
        before = earlier[0].terms["arrivals_per_s"]
        ago_s = round(view.at_s - earlier[0].at_s)
        yield Cause(
            weight=0.4,
            sentence=f"More calls arrive: {status.arrivals_per_s:.3g}/s, against {before:.3g}/s {ago_s} s ago.",
            evidence=(
                _seen("arrivals_per_s", status.model, status.arrivals_per_s, "calls/s", status.window_s),
                _seen("arrivals_per_s_before", status.model, before, "calls/s"),
            ),
        )


def _latest(view: ControlView, kinds: set[str]) -> dict[str, AlertSeen]:
    """The last recent alert of these kinds about each subject."""
    recent = (a for a in view.alerts if a.kind in kinds and view.at_s - a.at_s <= _ALERTS_FOR_S)
    return {alert.subject: alert for alert in recent}


def _names(replicas: Sequence[ReplicaStatus]) -> str:
    return ", ".join(r.replica_id for r in replicas)

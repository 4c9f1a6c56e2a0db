"""The stand-in for a language model: a few ordered rules that anyone can predict."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec

from swarmx.core.control import AlertSeen, ControlView, Evidence, ModelStatus, ProposalState, ToolCall
from swarmx.core.messages import AlertKind

BREAKERS = 3  # times that a replica was taken out within the window before it is cordoned
QUIET_S = 600.0  # how long a change that came to nothing is not proposed again
LONG_S = 900.0  # how long a bound must have been too wide before it is lowered
SAFE_POLICY = "least_outstanding"  # needs nothing but the router's own counts, so nothing can make it fail
_SPARE = 2  # bounds are wide when they exceed twice what was wanted by more than this many replicas


class Ruling(msgspec.Struct, frozen=True, kw_only=True):
    """What the rules choose, and the numbers that decided."""

    call: ToolCall
    reason: str
    evidence: tuple[Evidence, ...] = ()


def choose(view: ControlView, *, step: int) -> Ruling:
    """The first rule that applies; `step` is how far one change may move a bound.

    1. A replica whose breaker opened three times within the window, while another one of its model is ready, is
       cordoned.
    2. After a routing policy failed, the router goes back to the one that cannot fail.
    3. A model that waits at its upper bound, or asked for more, gets a higher one, up to its limit.
    4. A model that wanted less than half of its upper bound for a quarter of an hour gets a lower one.
    5. Otherwise nothing.
    """
    return (
        _failing_replica(view)
        or _failed_policy(view)
        or _too_few(view, step)
        or _too_many(view, step)
        or Ruling(call=ToolCall(tool="no_op", arguments={}), reason="No rule applies.", evidence=_calm(view))
    )


def evidence_about(view: ControlView, call: ToolCall) -> tuple[Evidence, ...]:
    """The figures of the model that the call is about; of the workflows when it is about none."""
    replica = view.replicas.get(str(call.arguments.get("replica_id")))
    model = view.models.get(replica.model if replica else str(call.arguments.get("model")))
    return _calm(view) if model is None else _figures(model)


def _failing_replica(view: ControlView) -> Ruling | None:
    opened = Counter(alert.subject for alert in _recent(view, "breaker_opened"))
    for replica_id, times in opened.most_common():
        replica = view.replicas.get(replica_id)
        if times < BREAKERS or replica is None or replica.state != "ready":
            continue
        model = view.models.get(replica.model)
        call = ToolCall(tool="cordon_replica", arguments={"replica_id": replica_id, "cordoned": True})
        if model is None or model.ready < 2 or _lately(view, call):
            continue
        seen = Evidence(metric="breaker_opened", subject=replica_id, value=times, window_s=view.window_s)
        reason = f"{replica_id} was taken out by its breaker {times} times; {model.ready - 1} others are ready."
        return Ruling(call=call, reason=reason, evidence=(seen, *_figures(model)))
    return None


def _failed_policy(view: ControlView) -> Ruling | None:
    failed = [alert for alert in _recent(view, "policy_failed") if alert.subject == view.routing.policy]
    call = ToolCall(tool="set_routing_policy", arguments={"policy": SAFE_POLICY})
    if not failed or view.routing.policy == SAFE_POLICY or _lately(view, call):
        return None
    return Ruling(
        call=call,
        reason=f"The routing policy {view.routing.policy} failed; {SAFE_POLICY} needs only the router's own counts.",
        evidence=(
            Evidence(metric="policy_failed", subject=view.routing.policy, value=len(failed), window_s=view.window_s),
        ),
    )


def _too_few(view: ControlView, step: int) -> Ruling | None:
    asked = {alert.subject: alert.value for alert in _recent(view, "at_max")}
    for model in sorted(view.models.values(), key=lambda m: -m.waiting):
        if model.min_replicas is None or model.max_replicas is None or model.limit is None:
            continue
        at_bound = model.ready + model.starting >= model.max_replicas
        wants = max(model.wanted or 0.0, asked.get(model.model, 0.0))
        if not at_bound or not (model.waiting > 0 or wants > model.max_replicas):
            continue
        needed = max(math.ceil(min(wants, model.limit)), model.max_replicas + 1)
        higher = min(needed, model.max_replicas + step, model.limit)
        call = _bounds(model.model, model.min_replicas, higher)
        # A raise that is in force and not verified yet does not stop the next: it was too small.
        if higher <= model.max_replicas or _lately(view, call, pending=("suggested", "open")):
            continue
        reason = f"{model.model} wants {wants:.0f} replicas and may have {model.max_replicas}"
        reason += f"; {model.waiting} calls wait." if model.waiting else "."
        return Ruling(call=call, reason=reason, evidence=_figures(model))
    return None


def _too_many(view: ControlView, step: int) -> Ruling | None:
    since_s = view.at_s - LONG_S
    for model in view.models.values():
        plans = [plan for plan in view.plans if plan.model == model.model]
        before = [plan for plan in plans if plan.at_s <= since_s][-1:]  # in force when that time began
        if model.min_replicas is None or model.max_replicas is None or model.waiting > 0 or not before:
            continue
        wanted = max(plan.wanted for plan in plans if plan.at_s >= before[0].at_s)
        fits = max(model.min_replicas, model.ready + model.starting, math.ceil(2 * wanted), 1)
        call = _bounds(model.model, model.min_replicas, max(fits, model.max_replicas - step))
        if fits + _SPARE >= model.max_replicas or _lately(view, call):
            continue
        seen = Evidence(metric="most_wanted", subject=model.model, value=wanted, unit="replicas", window_s=LONG_S)
        return Ruling(
            call=call,
            reason=f"{model.model} wanted {wanted:.1f} replicas at most in {LONG_S / 60:.0f} minutes, far below "
            f"its bound of {model.max_replicas}.",
            evidence=(seen, *_figures(model)),
        )
    return None


def _recent(view: ControlView, kind: AlertKind) -> list[AlertSeen]:
    return [alert for alert in view.alerts if alert.kind == kind and view.at_s - alert.at_s <= view.window_s]


def _bounds(model: str, least: int, most: int) -> ToolCall:
    return ToolCall(tool="set_replica_bounds", arguments={"model": model, "min_replicas": least, "max_replicas": most})


def _lately(
    view: ControlView, call: ToolCall, pending: tuple[ProposalState, ...] = ("suggested", "open", "applied")
) -> bool:
    """Whether the same change is `pending`, or came to nothing a short while ago."""
    return any(
        p.state in pending
        or (p.state not in ("suggested", "open", "applied", "kept") and view.at_s - p.at_s <= QUIET_S)
        for p in view.proposals
        if p.actor.type == "coordinator" and p.call.tool == call.tool and _subject(p.call) == _subject(call)
    )


def _subject(call: ToolCall) -> Any:
    return call.arguments.get("replica_id", call.arguments.get("model"))


def _figures(model: ModelStatus) -> tuple[Evidence, ...]:
    name, window_s = model.model, model.window_s
    figures = [
        Evidence(metric="ready", subject=name, value=model.ready, unit="replicas"),
        Evidence(metric="in_flight", subject=name, value=model.in_flight, unit="calls"),
        Evidence(metric="waiting", subject=name, value=model.waiting, unit="calls"),
        Evidence(metric="arrivals_per_s", subject=name, value=model.arrivals_per_s, window_s=window_s),
        Evidence(metric="p95_s", subject=name, value=model.p95_s, unit="s", window_s=window_s),
    ]
    if model.max_replicas is not None:
        figures.append(Evidence(metric="max_replicas", subject=name, value=model.max_replicas, unit="replicas"))
        figures.append(Evidence(metric="wanted", subject=name, value=model.wanted, unit="replicas"))
    return tuple(figures)


def _calm(view: ControlView) -> tuple[Evidence, ...]:
    waiting = sum(m.waiting for m in view.models.values())
    return (
        Evidence(
            metric="workflow_p95_s", subject="workflows", value=view.workflow_p95_s, unit="s", window_s=view.window_s
        ),
        Evidence(metric="waiting", subject="models", value=waiting, unit="calls"),
    )

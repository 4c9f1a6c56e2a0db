"""What is measured around a change, and when it counts as having made things worse."""

from __future__ import annotations

from collections.abc import Iterable

from swarmx.core.control import ControlView, Diff, Evidence, Scalar
from swarmx.tools.facts import touched
from swarmx.tools.tool import Verification

Figures = tuple[Evidence, ...]

WORSE = 1.25  # a P95 above this many times the one before is worse
COMPARABLE = 1.25  # arrivals up to this many times those before cannot be blamed for a worse P95
ENOUGH_CALLS = 10  # fewer do not make a P95
MORE_FAILURES = 0.1  # so much more of the calls failing is worse, whatever the load


def figures_of(diff: Diff, view: ControlView) -> Figures:
    """Latency and load of the models that the diff touches, or, where it touches none, of all that have calls."""
    models = [view.models[name] for name in sorted(touched(diff)) if name in view.models]
    found: list[Evidence] = []
    for model in models or [model for model in view.models.values() if model.ended or model.waiting]:
        name, window_s = model.model, model.window_s
        found += [
            Evidence(metric="p95_s", subject=name, value=model.p95_s, unit="s", window_s=window_s),
            Evidence(metric="arrivals_per_s", subject=name, value=model.arrivals_per_s, window_s=window_s),
            Evidence(metric="ended", subject=name, value=model.ended, unit="calls", window_s=window_s),
            Evidence(metric="failed", subject=name, value=model.failed, unit="calls", window_s=window_s),
            Evidence(metric="waiting", subject=name, value=model.waiting, unit="calls"),
        ]
    return tuple(found)


def after_growth(before: Figures, after: Figures) -> Verification:
    """More capacity is never taken back because latency rose: a growing crowd is why it was added."""
    return Verification(
        kept=True,
        metric="p95_s",
        before=_call_p95_s(before, _models(before)),
        after=_call_p95_s(after, _models(after)),
    )


def after_shrinking(before: Figures, after: Figures) -> Verification:
    """Less capacity is taken back when calls wait, or when the P95 grew under comparable load."""
    waiting = _waiting(after)
    if waiting > 0:
        return Verification(
            kept=False, metric="waiting", before=_waiting(before), after=waiting, detail=f"{waiting:.0f} calls wait"
        )
    return after_policy(before, after)


def after_policy(before: Figures, after: Figures) -> Verification:
    """Worse: more calls fail, or the P95, over the models with comparable load, weighted by their calls, grew."""
    failing_before, failing = _failed_share(before), _failed_share(after)
    if failing is not None and failing > (failing_before or 0.0) + MORE_FAILURES:
        return Verification(
            kept=False,
            metric="failed_share",
            before=failing_before,
            after=failing,
            detail=f"{failing:.0%} of the calls fail",
        )
    models = [name for name in _models(before) if _comparable(name, before, after)]
    was, now = _call_p95_s(before, models, weights=after), _call_p95_s(after, models)
    if was is None or now is None:
        return Verification(kept=True, metric="p95_s", detail="too few calls under comparable load to tell")
    kept = now <= WORSE * was
    detail = "" if kept else f"P95 went from {was:.3g} to {now:.3g} s"
    return Verification(kept=kept, metric="p95_s", before=was, after=now, detail=detail)


def after_scaling_policy(before: Figures, after: Figures) -> Verification:
    """As for routing; and worse as well when calls of a model wait that did not, under comparable load."""
    for name in _models(before):
        was, now = _value(before, "waiting", name), _value(after, "waiting", name)
        if was == 0 and now is not None and now > 0 and _comparable_arrivals(name, before, after):
            return Verification(kept=False, metric="waiting", before=was, after=now, detail=f"{now:.0f} calls wait")
    return after_policy(before, after)


def unmeasured() -> Verification:
    """A roll back is not judged again."""
    return Verification(kept=True, metric="none")


def _models(figures: Figures) -> list[str]:
    return list(dict.fromkeys(line.subject for line in figures if line.metric == "ended"))


def _value(figures: Figures, metric: str, subject: str) -> float | None:
    """The last line wins: the tool's own figures come after what the proposer brought."""
    for line in reversed(figures):
        if line.metric == metric and line.subject == subject:
            return _number(line.value)
    return None


def _number(value: Scalar | None) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _waiting(figures: Figures) -> float:
    return sum(_value(figures, "waiting", name) or 0.0 for name in _models(figures))


def _failed_share(figures: Figures) -> float | None:
    models = _models(figures)
    ended = sum(_value(figures, "ended", name) or 0.0 for name in models)
    failed = sum(_value(figures, "failed", name) or 0.0 for name in models)
    return failed / ended if ended >= ENOUGH_CALLS else None


def _comparable_arrivals(name: str, before: Figures, after: Figures) -> bool:
    was, now = _value(before, "arrivals_per_s", name), _value(after, "arrivals_per_s", name)
    return was is not None and now is not None and now <= COMPARABLE * was


def _comparable(name: str, before: Figures, after: Figures) -> bool:
    measured = all(
        (_value(figures, "ended", name) or 0.0) >= ENOUGH_CALLS and _value(figures, "p95_s", name) is not None
        for figures in (before, after)
    )
    return measured and _comparable_arrivals(name, before, after)


def _call_p95_s(figures: Figures, models: Iterable[str], *, weights: Figures | None = None) -> float | None:
    total = weighed = 0.0
    for name in models:
        p95_s, calls = _value(figures, "p95_s", name), _value(weights or figures, "ended", name)
        if p95_s is not None and calls:
            total += p95_s * calls
            weighed += calls
    return total / weighed if weighed else None

"""Signals: values that come from outside while a run is on its way, and that some of its nodes wait for."""

from __future__ import annotations

from collections.abc import Iterable

from swarmx.core.errors import WorkflowError
from swarmx.workflows.events import Failed, SignalAwaited, SignalReceived
from swarmx.workflows.limits import TEXT_CHARS
from swarmx.workflows.nodes import WorkflowSpec
from swarmx.workflows.schemas import check_value
from swarmx.workflows.state import NodeRun, Run
from swarmx.workflows.values import Json, checked, nearest


def check_signal(spec: WorkflowSpec, name: str, value: Json) -> None:
    """Raises WorkflowError for a signal that the definition does not declare, or a value that it does not take."""
    signal = spec.signals.get(name)
    if signal is None:
        known = ", ".join(sorted(spec.signals)) or "none"
        raise WorkflowError(
            f"the workflow declares no signal {name!r}{nearest(name, set(spec.signals))}; its signals: {known}"
        )
    where = f"signals.{name}"
    try:
        checked(value, limit=TEXT_CHARS)
        if signal.json_schema is not None:
            check_value(value, signal.json_schema, "the value")
    except WorkflowError as error:
        raise WorkflowError(error.detail, where=where) from error


def missing(run: Run, run_node: NodeRun) -> list[str]:
    """The signals without which nothing can be decided about the node now."""
    needed = run_node.step.closing if run_node.scopes else run_node.step.opening
    return sorted(needed - run.signals.keys()) if needed else []


def await_signals(run: Run, names: Iterable[str], now_s: float) -> list[SignalAwaited]:
    """What is to be recorded when something waits for these: nothing for those that are waited for already."""
    events: list[SignalAwaited] = []
    for name in dict.fromkeys(names):
        if name not in run.awaited:
            timeout_s = run.graph.spec.signals[name].timeout_s
            events.append(SignalAwaited(name=name, timeout_at_s=None if timeout_s is None else now_s + timeout_s))
    return events


def overdue(run: Run, now_s: float) -> SignalReceived | Failed | None:
    """What becomes of a signal that did not come in time: its default, or the end of the run."""
    late = next((name for name, at_s in run.awaited.items() if at_s is not None and at_s <= now_s), None)
    if late is None:
        return None
    signal = run.graph.spec.signals[late]
    if signal.default is not None:
        return SignalReceived(name=late, value=signal.default)
    waiting = next((path for path in run.due if late in missing(run, run.nodes[path])), None)
    why = f"the signal {late!r} did not come within timeout_s, {signal.timeout_s:g} s, and has no default"
    return Failed(error=why, path=waiting)

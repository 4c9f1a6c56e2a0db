"""Answers an operator's question in sentences, from one snapshot and the tail of the audit log, with its evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from swarmx.agents.explain import explain
from swarmx.core.audit import AuditRecord, Report
from swarmx.core.control import Change, ControlView, Evidence, ModelStatus, Proposal, Scalar, ToolCall
from swarmx.core.nouns import Decision
from swarmx.core.scaling import ScalePlan
from swarmx.llm_coordinator.diagnosis import causes, figures
from swarmx.llm_coordinator.intents import (
    Ask,
    Decide,
    HowIsTheModel,
    Unclear,
    Unknown,
    WhatChanged,
    WhoScaled,
    WhyCall,
    WhySlow,
    examples,
)
from swarmx.llm_coordinator.phrases import span_words

Question = WhySlow | WhyCall | WhatChanged | WhoScaled | HowIsTheModel | Ask | Decide | Unclear | Unknown

_MOST_LINES = 20
_MOST_CAUSES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Sentences, and the numbers that they rest on."""

    lines: tuple[str, ...]
    evidence: tuple[Evidence, ...] = ()


def answer(
    question: Question, view: ControlView, *, records: Sequence[AuditRecord] = (), chain: Sequence[str] = ()
) -> Answer:
    """`records` are those of the audit log that the question needs, oldest first; `chain` is what its check found."""
    match question:
        case WhySlow(model=model):
            answers = [_why_slow(name, view) for name in (view.models if model is None else [model])]
            return _joined(answers) if answers else _NO_MODEL
        case WhyCall(call_id=call_id, replica_id=replica_id):
            return _why_call(call_id, replica_id, view.decisions.get(call_id, ()))
        case WhatChanged(window_s=window_s):
            return _what_changed(window_s, view, records)
        case WhoScaled(model=model):
            return _who_scaled(model, view, records)
        case HowIsTheModel(model=model):
            return _how_is(view.models[model], view)
        case Ask(about=about):
            return _ask(about, view, chain)
        case Decide():
            return _decide(question, view)
        case Unclear(problem=problem, choices=choices):
            more = f" Which one: {', '.join(choices)}?" if choices else ""
            return Answer(lines=(f"I am not sure what you mean: {problem}.{more}",))
        case Unknown(examples=nearest):
            return Answer(lines=("I do not understand that. I do understand, for example:", *_listed(nearest)))
        case _:
            assert_never(question)


def ago(seconds: float) -> str:
    """How long ago, in one unit."""
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def call_words(call: ToolCall) -> str:
    """A tool call on one line."""
    return f"{call.tool}({', '.join(f'{name}={value}' for name, value in call.arguments.items())})"


def value_words(value: Scalar | None) -> str:
    """A number, word or nothing, as it is read."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def evidence_words(item: Evidence) -> str:
    """One number with what it is of."""
    unit = f" {item.unit}" if item.unit else ""
    over = "" if item.window_s is None else f" over {item.window_s:g} s"
    return f"{item.metric} of {item.subject}: {value_words(item.value)}{unit}{over}"


def change_words(change: Change) -> str:
    """One line of a diff."""
    return f"{change.subject}: {change.what} {value_words(change.before)} → {value_words(change.after)}"


def proposal_words(proposal: Proposal) -> tuple[str, ...]:
    """What was asked for, and what it would change."""
    changes = [f"  {change_words(change)}" for change in proposal.diff.changes] or ["  It would change nothing."]
    return (f"{proposal.proposal_id}: {call_words(proposal.call)}", *changes)


def report_words(report: Report) -> tuple[str, ...]:
    """The verdict on the audit log, one sentence a finding."""
    lines = [f"Record {finding.seq}: {finding.verdict}: {finding.detail}" for finding in report.findings]
    if report.sound:
        known = f"; the head kept of record {report.head.seq} confirms it" if report.head is not None else ""
        chained = f"{report.records} records, each chained to the one before{known}"
        lines.insert(0, f"The audit log is intact: {chained if report.records else 'it is empty'}.")
    else:
        lines.insert(0, f"The audit log is NOT as it was written ({report.records} records can be read):")
    if report.start.seq:
        lines.append(f"Records 1 to {report.start.seq} made room for newer ones, as the log says.")
    if report.open_intents:
        names = ", ".join(f"{r.seq} ({r.entry.tool} by {r.entry.actor.name})" for r in report.open_intents[:5])
        lines.append(f"{len(report.open_intents)} actions have no outcome yet: {names}.")
    return tuple(lines)


_NO_MODEL = Answer(lines=("There is no model here yet.",))


def _joined(answers: Sequence[Answer]) -> Answer:
    return Answer(
        lines=tuple(line for one in answers for line in one.lines),
        evidence=tuple(item for one in answers for item in one.evidence),
    )


def _why_slow(model: str, view: ControlView) -> Answer:
    status, found = view.models[model], causes(model, view)[:_MOST_CAUSES]
    if not found:
        return Answer(
            lines=(f"{model} is not slow by its figures: {_latency(status)}, and nothing waits.",),
            evidence=figures(status),
        )
    reasons = [f"{number}. {cause.sentence}" for number, cause in enumerate(found, 1)]
    advice = [f'You could say: "{cause.advice}".' for cause in found if cause.advice]
    return Answer(
        lines=(f"{model}: {_latency(status)}. What its figures show, heaviest first:", *reasons, *advice),
        evidence=tuple(dict.fromkeys([*(e for cause in found for e in cause.evidence), *figures(status)])),
    )


def _latency(status: ModelStatus) -> str:
    if status.p50_s is None or status.p95_s is None:
        return f"no call ended in the last {status.window_s:.0f} s"
    return f"latency {status.p50_s:.3g} s at P50 and {status.p95_s:.3g} s at P95 over {status.window_s:.0f} s"


def _why_call(call_id: str, replica_id: str | None, decisions: Sequence[Decision]) -> Answer:
    if not decisions:
        return Answer(lines=(f"No decision about a call {call_id} is known here; ids are in x-swarmx-call-id.",))
    lines: list[str] = []
    evidence: list[Evidence] = []
    if replica_id is not None and all(d.replica_id != replica_id for d in decisions):
        lines += _not_there(replica_id, decisions[-1])
    for decision in decisions:
        lines += explain(decision)
        seen = decision.candidates
        for name in (decision.replica_id, decision.runner_up):
            if name is not None:
                row = seen.replica_ids.index(name)
                evidence.append(Evidence(metric="in_flight", subject=name, value=seen.in_flight[row], unit="calls"))
                if seen.cost_s is not None:
                    evidence.append(Evidence(metric="expected_s", subject=name, value=seen.cost_s[row], unit="s"))
    return Answer(lines=tuple(lines), evidence=tuple(evidence))


def _not_there(replica_id: str, decision: Decision) -> Iterator[str]:
    yield f"The call did not go to {replica_id}; it went to {decision.replica_id}."
    seen = decision.candidates
    if replica_id not in seen.replica_ids:
        yield f"{replica_id} is not among the candidates that were kept: it was not ready, or among the costliest."
        return
    row, chosen = seen.replica_ids.index(replica_id), seen.replica_ids.index(decision.replica_id)
    if seen.cost_s is not None and seen.cost_s[row] is not None and seen.cost_s[chosen] is not None:
        yield f"It was expected to take {seen.cost_s[row]:.3g} s there, against {seen.cost_s[chosen]:.3g} s."
    else:
        yield f"It had {seen.in_flight[row]} calls in flight, against {seen.in_flight[chosen]}."


def _what_changed(window_s: float, view: ControlView, records: Sequence[AuditRecord]) -> Answer:
    since_s = view.at_s - window_s
    lines = _history([r for r in records if r.at_s >= since_s], view.at_s)
    alerts = [a for a in view.alerts if a.at_s >= since_s]
    told = [f"{ago(view.at_s - a.at_s)}: alert {a.kind} about {a.subject}" for a in reversed(alerts)]
    span = span_words(window_s)
    if not lines and not told:
        return Answer(lines=(f"Nothing changed in the last {span}, and there was no alert.",))
    return Answer(
        lines=(f"In the last {span}, newest first:", *_cut(lines), *_cut(told)),
        evidence=(
            Evidence(metric="control_actions", subject="cluster", value=len(lines), window_s=window_s),
            Evidence(metric="alerts", subject="cluster", value=len(alerts), window_s=window_s),
        ),
    )


def _who_scaled(model: str, view: ControlView, records: Sequence[AuditRecord]) -> Answer:
    intents = {r.seq for r in records if _about(r, model, view)}
    lines = _history([r for r in records if r.seq in intents or r.entry.intent_seq in intents], view.at_s)
    plans = [p for p in view.plans if p.model == model and (p.deploys or p.drains)]
    told = [_plan_words(plan, view.at_s) for plan in reversed(plans)]
    if not lines and not told:
        return Answer(lines=(f"Nobody changed the replicas of {model} as far back as is kept here.",))
    return Answer(
        lines=(f"What changed the replicas of {model}, newest first:", *_cut(lines), *_cut(told)),
        evidence=tuple(
            Evidence(metric=name, subject=model, value=value)
            for plan in plans[-1:]
            for name, value in plan.terms.items()
        ),
    )


def _about(record: AuditRecord, model: str, view: ControlView) -> bool:
    """Whether the model or a replica of it is named; one that is gone is known by its name, which begins so."""
    entry = record.entry
    named = {str(value) for value in entry.arguments.values()} | {change.subject for change in entry.changes}
    own = {model} | {r.replica_id for r in view.replicas.values() if r.model == model}
    begins = (max((m for m in view.models if name.startswith(f"{m}-")), key=len, default=None) for name in named)
    return bool(named & own) or model in begins


def _plan_words(plan: ScalePlan, now_s: float) -> str:
    done = [f"started {', '.join(plan.deploys)}"] if plan.deploys else []
    done += [f"drained {', '.join(plan.drains)}"] if plan.drains else []
    terms = ", ".join(f"{name} {value:.3g}" for name, value in plan.terms.items())
    return (
        f"{ago(now_s - plan.at_s)}: the scaler ({plan.policy}, {plan.reason}) {' and '.join(done)}: it had "
        f"{plan.have:g} and wanted {plan.wanted:.2f} in bounds {plan.min_replicas}..{plan.max_replicas}"
        + (f" ({terms})" if terms else "")
    )


def _history(records: Sequence[AuditRecord], now_s: float) -> list[str]:
    """One line an action, newest first, each with how it ended as far as the records tell."""
    ended = {r.entry.intent_seq: r.entry for r in records if r.entry.kind == "outcome"}
    lines = []
    for record in reversed(records):
        entry = record.entry
        if entry.kind == "outcome":
            continue
        outcome = ended.get(record.seq)
        how = (outcome.outcome if outcome else "under way") if entry.kind == "intent" else entry.outcome or "noted"
        refused = entry.verdict.detail if entry.verdict is not None and not entry.verdict.allowed else ""
        detail = (outcome.detail if outcome else "") or refused or entry.detail
        call = call_words(ToolCall(tool=entry.tool, arguments=entry.arguments))
        changes = "; ".join(change_words(change) for change in entry.changes)
        who = f"{entry.actor.name} ({entry.actor.role}, by {entry.via})"
        lines.append(
            f"{ago(now_s - record.at_s)}: {who} {call}" + (f" {changes}" if changes else "") + f": {how}"
            + (f" ({detail})" if detail else "")
        )  # fmt: skip
    return lines


def _how_is(status: ModelStatus, view: ControlView) -> Answer:
    lines = [_model_line(status)]
    for r in (r for r in view.replicas.values() if r.model == status.model and r.state != "gone"):
        emulated = ", emulated" if r.emulated else ""
        lines.append(f"  {r.replica_id}: {r.state}, {r.in_flight} in flight, {r.utilisation:.0%} busy{emulated}")
    return Answer(lines=tuple(lines), evidence=figures(status))


def _model_line(status: ModelStatus) -> str:
    bounds = (
        f"bounds {status.min_replicas}..{status.max_replicas} of {status.limit}"
        if status.min_replicas is not None
        else "not scaled by SwarmX"
    )
    wanted = f", {status.wanted:.1f} wanted" if status.wanted is not None else ""
    more = [f"{n} {what}" for what in ("starting", "cordoned", "draining") if (n := getattr(status, what))]
    return (
        f"{status.model}: {', '.join([f'{status.ready} ready', *more])} ({bounds}{wanted}); "
        f"{status.in_flight} in flight, {status.waiting} waiting; {status.arrivals_per_s:.3g} calls/s; "
        f"{_latency(status)}; {status.failed} failed"
    )


def _ask(
    about: Literal["cluster", "running", "proposals", "audit", "help"], view: ControlView, chain: Sequence[str]
) -> Answer:
    match about:
        case "cluster":
            return _cluster(view)
        case "running":
            busy = [r for r in view.replicas.values() if r.in_flight]
            total = sum(r.in_flight for r in busy)
            return Answer(
                lines=(
                    f"{view.workflows_running} workflows are running, with {total} calls at replicas.",
                    *(f"  {r.replica_id}: {r.in_flight} calls" for r in busy),
                    "`swarmx workflows --state running` lists them.",
                ),
                evidence=(Evidence(metric="workflows_running", subject="cluster", value=view.workflows_running),),
            )
        case "proposals":
            waiting = [p for p in view.proposals if p.state == "open"]
            if not waiting:
                return Answer(lines=("No proposal waits for a decision.",))
            rows = [
                line
                for p in waiting
                for line in (*proposal_words(p), f"  by {p.actor.name}, {ago(view.at_s - p.at_s)}")
            ]
            return Answer(lines=(f"{len(waiting)} wait for a decision:", *rows, _HOW))
        case "audit":
            return Answer(lines=tuple(chain) or ("The audit log was not checked.",))
        case "help":
            return Answer(lines=("You can ask and order, for example:", *_listed(examples(view))))
        case _:
            assert_never(about)


def _cluster(view: ControlView) -> Answer:
    if not view.models:
        return _NO_MODEL
    ready = sum(m.ready for m in view.models.values())
    p95 = f"{view.workflow_p95_s:.3g} s" if view.workflow_p95_s is not None else "not known yet"
    recent = [a for a in view.alerts if view.at_s - a.at_s <= 600.0]
    waiting = sum(p.state == "open" for p in view.proposals)
    return Answer(
        lines=(
            f"{ready} replicas of {len(view.models)} models are ready; {view.workflows_running} workflows are running; "
            f"workflow P95 is {p95} over {view.window_s:.0f} s.",
            *(f"  {_model_line(status)}" for status in view.models.values()),
            f"Routing by {view.routing.policy}, scaling by {view.scaling.policy}.",
            *_cut([f"Alert {ago(view.at_s - a.at_s)}: {a.kind} about {a.subject}" for a in reversed(recent)]),
            *([f"{waiting} proposals wait for a decision."] if waiting else []),
        ),
        evidence=(
            Evidence(
                metric="workflow_p95_s", subject="cluster", value=view.workflow_p95_s, unit="s", window_s=view.window_s
            ),
            Evidence(metric="ready", subject="cluster", value=ready, unit="replicas"),
        ),
    )


_HOW = (
    "Decide with `swarmx proposals approve PROPOSAL`, `swarmx proposals deny PROPOSAL`, or the buttons on the web page."
)


def _decide(question: Decide, view: ControlView) -> Answer:
    name = question.proposal_id
    if name is None:
        waiting = [p.proposal_id for p in view.proposals if p.state == "open"]
        which = f"Open are: {', '.join(waiting)}." if waiting else "None is open now."
        return Answer(lines=("A sentence decides nothing, so that nobody approves by mistake. " + _HOW, which))
    command = f"`swarmx proposals {question.decision} {name}`"
    line = (
        f"A sentence decides nothing, so that nobody approves by mistake: use {command} or its button on the web page."
    )
    return Answer(lines=(line,))


def _listed(sentences: Sequence[str]) -> list[str]:
    return [f"  {sentence}" for sentence in sentences]


def _cut(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"and {more} more."] if more > 0 else [])]

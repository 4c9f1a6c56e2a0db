"""What waits for a signal goes on when it comes, whenever that is, and does not wait for longer than it may."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.core.errors import WorkflowError
from swarmx.workflows.events import (
    Event,
    Failed,
    Finished,
    NodeFinished,
    SignalAwaited,
    SignalReceived,
    decode_event,
    encode_event,
)
from swarmx.workflows.forks import fork
from swarmx.workflows.plan import advance, wake_at_s
from swarmx.workflows.signals import check_signal
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from tests.workflows.histories.record import text

GATE = """
name: gate
signals:
  approve: {timeout_s: 60}
nodes:
  draft: {kind: llm, model: m, prompt: write}
  send: {kind: llm, model: m, prompt: "{{ draft.text }} {{ signals.approve }}"}
"""


def started(source: Any, **inputs: Any) -> tuple[Run, list[Event], list[str]]:
    run, submitted = Run.start(parse_workflow(source), inputs)
    events, calls = advance(run, now_s=0.0)
    return run, [submitted, *events], [call.path for call in calls]


def answer(run: Run, path: str, now_s: float = 0.0) -> tuple[list[Event], list[str]]:
    events, calls = advance(run, [NodeFinished(path=path, output=text(f"{path} said"))], now_s=now_s)
    return events, [call.path for call in calls]


def received(name: str, value: Any = True, signal_id: str | None = "s-1") -> SignalReceived:
    return SignalReceived(name=name, value=value, signal_id=signal_id)


def test_a_node_waits_for_the_signal_that_it_names_and_sees_its_value() -> None:
    run, _, calls = started(GATE)
    assert calls == ["draft"]
    events, calls = answer(run, "draft", now_s=5.0)
    assert calls == []
    assert events[1:] == [SignalAwaited(name="approve", timeout_at_s=65.0)]
    assert advance(run, now_s=6.0) == ([], []), "it is awaited once"
    _, starts = advance(run, [received("approve", {"by": "ann"})], now_s=7.0)
    assert [call.body["messages"][0]["content"] for call in starts] == ['draft said {"by":"ann"}']  # type: ignore[union-attr]
    assert wake_at_s(run) is None


def test_a_signal_that_comes_before_anybody_waits_is_kept() -> None:
    run, _, _ = started(GATE)
    assert advance(run, [received("approve")], now_s=1.0)[1] == []
    events, calls = answer(run, "draft")
    assert calls == ["send"]
    assert not any(isinstance(event, SignalAwaited) for event in events)


def test_a_signal_that_does_not_come_in_time_ends_the_run_and_says_so() -> None:
    run, _, _ = started(GATE)
    answer(run, "draft", now_s=5.0)
    assert wake_at_s(run) == 65.0
    assert advance(run, now_s=64.9) == ([], [])
    advance(run, now_s=65.0)
    why = "the signal 'approve' did not come within timeout_s, 60 s, and has no default"
    assert run.end == Failed(error=why, path="send")


def test_a_signal_that_does_not_come_in_time_has_its_default() -> None:
    run, _, _ = started(GATE.replace("timeout_s: 60", "timeout_s: 60, default: no"))
    answer(run, "draft", now_s=5.0)
    events, starts = advance(run, now_s=70.0)
    assert events[0] == SignalReceived(name="approve", value="no")
    assert [call.path for call in starts] == ["send"]


def test_a_signal_without_a_timeout_is_waited_for_as_long_as_it_takes() -> None:
    run, _, _ = started(GATE.replace("{timeout_s: 60}", "{}"))
    answer(run, "draft")
    assert wake_at_s(run) is None
    assert advance(run, now_s=1e9) == ([], [])
    assert [call.path for call in advance(run, [received("approve")], now_s=1e9)[1]] == ["send"]


def test_a_node_inside_a_body_waits_by_itself() -> None:
    source = """
    name: x
    signals: {go: {}}
    nodes:
      each:
        kind: map
        over: "[1, 2]"
        do:
          ask: {kind: llm, model: m, prompt: p}
          use: {kind: llm, model: m, prompt: "{{ ask.text }} {{ signals.go }}"}
    """
    run, _, calls = started(source)
    assert calls == ["each[0].ask", "each[1].ask"], "the map does not wait, what is in it does"
    answer(run, "each[0].ask")
    answer(run, "each[1].ask")
    assert [call.path for call in advance(run, [received("go")], now_s=0.0)[1]] == ["each[0].use", "each[1].use"]


def test_a_loop_waits_for_the_signals_of_its_condition_only_after_its_body() -> None:
    source = """
    name: x
    signals: {stop: {}}
    nodes:
      l:
        kind: loop
        max_iterations: 3
        until: signals.stop
        do: {ask: {kind: llm, model: m, prompt: p}}
    """
    run, _, calls = started(source)
    assert calls == ["l[1].ask"]
    answer(run, "l[1].ask")
    advance(run, [received("stop", True)], now_s=0.0)
    assert isinstance(run.end, Finished)


def test_outputs_wait_for_the_signals_that_they_name() -> None:
    source = "{name: x, signals: {by: {}}, nodes: {a: {kind: llm, model: m, prompt: p}}, outputs: {by: signals.by}}"
    run, _, _ = started(source.replace("signals.by}", "'{{ signals.by }}'}"))
    events, _ = answer(run, "a")
    assert events[-1] == SignalAwaited(name="by")
    advance(run, [received("by", "ann")], now_s=0.0)
    assert run.end == Finished(outputs={"by": "ann"})


@pytest.mark.parametrize("name", ["approve", "nope"])
def test_a_signal_has_one_value_and_has_to_be_declared(name: str) -> None:
    run, _, _ = started(GATE)
    advance(run, [received("approve")], now_s=0.0)
    with pytest.raises(WorkflowError, match="not declared, or the event came before"):
        run.apply(received(name, 2))
    assert run.signals == {"approve": True}


def test_waiting_survives_a_restart_and_is_not_prolonged_by_it() -> None:
    run, events, _ = started(GATE)
    more, _ = answer(run, "draft", now_s=5.0)
    again = Run.rebuild([decode_event(encode_event(event)) for event in [*events, *more]])
    assert again == run
    assert wake_at_s(again) == 65.0
    assert advance(again, now_s=64.0) == ([], [])


def test_a_clock_that_was_set_back_does_not_prolong_the_wait() -> None:
    run, _, _ = started(GATE)
    answer(run, "draft", now_s=1000.0)
    run.set_back(900.0)
    assert wake_at_s(run) == 160.0


def test_a_fork_keeps_the_signals_that_had_come() -> None:
    run, events, _ = started(GATE)
    events += advance(run, [received("approve", "yes")], now_s=0.0)[0]
    events += answer(run, "draft")[0]
    events += answer(run, "send")[0]
    begun = Run.rebuild(fork(events, "send", forked_from="wf-old"))
    assert begun.signals == {"approve": "yes"}
    assert [call.path for call in advance(begun, now_s=0.0)[1]] == ["send"]


def test_a_fork_waits_anew_for_what_had_not_come() -> None:
    run, events, _ = started(GATE)
    events += answer(run, "draft", now_s=5.0)[0]
    begun = Run.rebuild(fork(events, "send", forked_from="wf-old"))
    assert advance(begun, now_s=100.0)[0] == [SignalAwaited(name="approve", timeout_at_s=160.0)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("approve: {timeout_s: 60}", "approve: {timeout: 60}"), "signals.approve.timeout: unknown field"),
        (
            ("signals.approve", "signals.aprove"),
            "no signal 'aprove' .did you mean 'approve'.*declared signals: approve",
        ),
        (("signals.approve", "signals"), "needs the name of one, such as signals.NAME"),
        (("signals.approve", "signals[draft.text]"), "needs the name of one, such as signals.NAME"),
        (("timeout_s: 60", "default: 1"), "a default is taken when timeout_s is over; set one"),
        (("timeout_s: 60", "timeout_s: 60, default: 1, schema: {type: string}"), "the default should be string, got 1"),
        (("signals:\n  approve: {timeout_s: 60}\n", ""), "no signals are declared"),
        (("  draft:", "  signals:"), "'signals' has a meaning of its own"),
    ],
)
def test_what_is_wrong_with_signals_is_named(change: tuple[str, str], problem: str) -> None:
    with pytest.raises(WorkflowError, match=problem):
        parse_workflow(GATE.replace(*change))


def test_without_declared_signals_a_node_may_be_called_so() -> None:
    run, _, _ = started("{name: x, nodes: {signals: {kind: tool, function: upper, args: {text: a}}}}")
    assert run.end == Finished(outputs={"signals": "A"})


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("zzz", True, "declares no signal 'zzz'; its signals: approve, note"),
        ("aprove", True, "did you mean 'approve'"),
        ("approve", "yes", "signals.approve: the value should be boolean, got 'yes'"),
        ("note", {"text": 1}, "signals.note: the value.text should be string"),
        ("note", {}, "signals.note: the value lacks the field 'text'"),
    ],
)
def test_a_value_that_the_workflow_does_not_take_is_refused(name: str, value: Any, problem: str) -> None:
    spec = parse_workflow(
        "{name: x, signals: {approve: {schema: {type: boolean}}, note: {schema: {type: object, properties: {text: "
        "{type: string}}, required: [text]}}}, nodes: {a: {kind: llm, model: m, prompt: p}}}"
    )
    with pytest.raises(WorkflowError, match=problem):
        check_signal(spec, name, value)


def test_several_waits_for_one_signal_are_recorded_once() -> None:
    source = "{name: x, signals: {go: {}}, nodes: {a: {kind: llm, model: m, prompt: '{{ signals.go }}'}, "
    run, events, _ = started(source + "b: {kind: tool, function: json_dump, args: {value: ['{{ signals.go }}']}}}}")
    assert events[1:] == [SignalAwaited(name="go")]
    assert [call.path for call in advance(run, [received("go", 7)], now_s=0.0)[1]] == ["a"]
    assert run.root.outputs == {"b": "[7]"}

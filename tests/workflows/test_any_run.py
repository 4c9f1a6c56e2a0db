"""Whatever a run is made of and whatever happens to it: it ends once, within its bounds, and by its events alone."""

from __future__ import annotations

from random import Random  # noqa: TID251  # the type of what hypothesis hands in
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmx.workflows.events import (
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    Finished,
    NodeFinished,
    NodeRetried,
    SignalReceived,
    decode_event,
    encode_event,
)
from swarmx.workflows.forks import fork
from swarmx.workflows.plan import advance, plan, wake_at_s
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from tests.workflows.agents import CATALOGUE
from tests.workflows.any_runs import PRICES, SIGNALS, answer, definition, happening, signal

SEEDS = st.randoms(use_true_random=False)
QUIETLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def check_bounds(run: Run) -> None:
    """No cap and no budget is exceeded, by what was used and by what may still be."""
    spec = run.graph.spec
    assert len(run.nodes) <= spec.limits.nodes
    assert run.retries <= spec.limits.retries
    assert all(node.scope.depth <= spec.limits.depth for node in run.nodes.values())
    budgets: dict[str, Any] = {path: getattr(node.step.node, "budget", None) for path, node in run.nodes.items()}
    for account, budget in {**budgets, "": spec.budget}.items():
        if budget is not None:
            total = run.ledger.spent_by(account) + run.ledger.reserved_by(account)
            assert total.tokens <= (budget.tokens or total.tokens), account
            assert total.steps <= (budget.steps or total.steps), account
            assert total.money <= (budget.money or total.money) * (1 + 1e-9), account


def begin(rng: Random) -> tuple[Run, list[Event], float]:
    run, submitted = Run.start(parse_workflow(definition(rng)), {}, workflow_id="wf-any")
    return run, [submitted, *advance(run, now_s=0.0, tools=CATALOGUE, prices=PRICES)[0]], 0.0


def later(run: Run, now_s: float) -> float:
    at_s = wake_at_s(run)
    return now_s if at_s is None else max(now_s, at_s)


@settings(QUIETLY, max_examples=120)
@given(rng=SEEDS)
def test_every_run_of_every_kind_ends_once_within_its_bounds_and_is_its_events(rng: Random) -> None:
    run, journal, now_s = begin(rng)
    while not run.ended:
        check_bounds(run)
        event = happening(rng, run, now_s, trouble=True)
        if event is None:
            assert run.in_flight or wake_at_s(run) is not None or run.awaited, "what has not ended waits for something"
            now_s = later(run, now_s)
        again = Run.rebuild([decode_event(encode_event(event)) for event in journal])
        assert again == run
        happened = [] if event is None else [event]
        events, calls = advance(run, happened, now_s=now_s, tools=CATALOGUE, prices=PRICES)
        assert advance(again, happened, now_s=now_s, tools=CATALOGUE, prices=PRICES) == (events, calls)
        journal += events
    check_bounds(run)
    assert sum(isinstance(event, Finished | Failed | Cancelled) for event in journal) == 1
    assert plan(run, now_s, CATALOGUE) == []
    assert Run.rebuild(journal) == run
    finished = [event.path for event in journal if isinstance(event, NodeFinished)]
    assert len(finished) == len(set(finished)), "a node finishes once"
    came = [event.name for event in journal if isinstance(event, SignalReceived)]
    assert len(came) == len(set(came)), "a signal has one value"
    assert sum(isinstance(event, NodeRetried) for event in journal) == run.retries
    assert isinstance(run.end, Cancelled) == any(isinstance(event, CancelRequested) for event in journal)


@settings(QUIETLY, max_examples=60)
@given(rng=SEEDS)
def test_a_run_can_be_taken_up_after_each_of_its_events(rng: Random) -> None:
    run, journal, now_s = begin(rng)
    while not run.ended:
        event = happening(rng, run, now_s, trouble=True)
        now_s = later(run, now_s) if event is None else now_s
        journal += advance(run, [] if event is None else [event], now_s=now_s, tools=CATALOGUE, prices=PRICES)[0]
    replayed = Run.rebuild(journal[:1])
    for number, event in enumerate(journal[1:], 1):
        replayed.apply(event)
        if number % 7 == 0 or number == len(journal) - 1:
            assert replayed == Run.rebuild(journal[: number + 1])
    assert replayed == run


def to_the_end(run: Run, order: Random) -> list[Event]:
    """Everything is answered, in some order, and both signals come at some time; the events."""
    unsent = [name for name in SIGNALS if name not in run.signals]
    journal, _ = advance(run, now_s=0.0, tools=CATALOGUE)
    while not run.ended:
        if unsent and (not run.in_flight or order.random() < 0.3):
            happened: Event = signal(unsent.pop(order.randrange(len(unsent))))
        else:
            path = order.choice(list(run.in_flight))
            happened = NodeFinished(path=path, output=answer(run, path))
        journal += advance(run, [happened], now_s=0.0, tools=CATALOGUE)[0]
    return journal


@settings(QUIETLY, max_examples=80)
@given(rng=SEEDS)
def test_answers_and_signals_in_any_order_come_to_the_same_end_and_so_does_every_fork(rng: Random) -> None:
    spec = parse_workflow(definition(rng, bounded=False))
    run, submitted = Run.start(spec, {})
    journal = [submitted, *to_the_end(run, rng)]
    assert isinstance(run.end, Finished)
    other, _ = Run.start(spec, {})
    to_the_end(other, rng)
    assert other.end == run.end
    path = rng.choice(list(run.nodes))
    begun = fork(journal, path, forked_from="wf-old")
    forked = Run.rebuild(begun)
    assert path not in {event.path for event in begun if isinstance(event, NodeFinished)}
    assert forked.ledger.spent == {}
    to_the_end(forked, rng)
    assert forked.end == run.end

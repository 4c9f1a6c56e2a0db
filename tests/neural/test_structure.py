"""What a workflow has shown, what others had before them, and what the structure head makes of both."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import PredictorError
from swarmx.neural.heads.fused import FusedHeads
from swarmx.neural.heads.remaining_memory import EVERY_MODEL, MOST_KINDS, QUANTITIES, RemainingMemory, Trail
from swarmx.neural.heads.structure import FEATURES, OPTIONAL, SPECS, anchor, features, recalled_forecast
from swarmx.neural.heads.text_marks import MARKS, marks_of
from swarmx.neural.heads.workflow_so_far import MOST_NAMES, WorkflowSoFar
from tests.neural.structures import random_heads

NUMBERS = st.floats(0.0, 1e9)


def a_trail(calls: int, *, model: str = "m", tokens: float = 50.0, second_s: float = 2.0) -> Trail:
    trail = Trail()
    for i in range(calls):
        trail.call_arrived(model)
        trail.call_ended(model, tokens, second_s * (i + 1))
    return trail


def taught(**calls_of_kind: list[int]) -> RemainingMemory:
    memory = RemainingMemory()
    for kind, lengths in calls_of_kind.items():
        for calls in lengths:
            memory.learn(kind, a_trail(calls), ended_s=2.0 * calls)
    return memory


def a_workflow(calls: int, *, kind: str = "k", model: str = "m") -> WorkflowSoFar:
    w = WorkflowSoFar(kind=kind, submitted_at_s=0.0)
    for i in range(calls):
        w.call_arrived(role="r", model=model, prompt_tokens=100.0 + i, at_s=2.0 * i)
        w.call_finished(model=model, output_tokens=50.0, at_s=2.0 * i + 1.0)
    return w


def calls_left(memory: RemainingMemory, kind: str, after: int, model: str = EVERY_MODEL) -> float:
    return math.exp(anchor(memory.recall(kind, model, after, after), "calls")) - 1.0


def test_a_known_kind_is_expected_to_go_on_as_it_did() -> None:
    memory = taught(short=[4] * 30, long=[20] * 30)
    assert calls_left(memory, "short", 1) == pytest.approx(3.0, abs=0.6)
    assert calls_left(memory, "long", 1) == pytest.approx(19.0, abs=2.5)
    assert calls_left(memory, "short", 4) == pytest.approx(0.0, abs=0.4)


def test_an_unseen_kind_is_expected_to_go_on_as_all_do() -> None:
    memory = taught(short=[4] * 30, long=[20] * 30)
    assert 3.0 < calls_left(memory, "unseen", 1) < 19.0
    assert memory.recall("unseen", EVERY_MODEL, 1, 1)[0].evidence == 0.0


def test_a_few_workflows_move_what_is_expected_of_a_new_kind() -> None:
    memory = taught(long=[20] * 30)
    before = calls_left(memory, "new", 1)
    for _ in range(4):
        memory.learn("new", a_trail(3), ended_s=6.0)
    assert calls_left(memory, "new", 1) < before / 2.0


def test_without_any_experience_the_spread_is_wide() -> None:
    forecast = recalled_forecast(RemainingMemory().recall("k", EVERY_MODEL, 0, 0), "calls")
    assert forecast.source == "prior"
    assert forecast.quantile(0.95) > 4.0 * forecast.quantile(0.5)


def test_a_workflow_that_is_taken_away_leaves_no_trace_in_what_is_expected() -> None:
    memory = taught(k=[4, 7, 9], other=[12])
    expected = memory.recall("k", EVERY_MODEL, 2, 2)
    sums = {EVERY_MODEL: a_trail(30).sums(EVERY_MODEL, ended_s=60.0)}
    memory.add("k", sums)
    assert memory.recall("k", EVERY_MODEL, 2, 2) != expected
    memory.add("k", sums, weight=-1.0)
    assert np.allclose(memory.recall("k", EVERY_MODEL, 2, 2), expected)


def test_one_models_calls_are_remembered_apart() -> None:
    memory, trail = RemainingMemory(), Trail()
    for model in ("big", *["small"] * 9):
        trail.call_arrived(model)
        trail.call_ended(model, 10.0, 1.0)
    for _ in range(30):
        memory.learn("k", trail, ended_s=10.0)
    assert set(memory.models("k")) == {"big", "small"}
    assert calls_left(memory, "k", 1, "big") < 0.6
    assert calls_left(memory, "k", 1, "small") == pytest.approx(9.0, abs=1.5)


def test_the_memory_of_kinds_is_bounded_and_the_oldest_goes() -> None:
    memory = RemainingMemory()
    for i in range(MOST_KINDS + 5):
        memory.learn(f"k{i}", a_trail(3), ended_s=6.0)
    assert len(memory) == MOST_KINDS
    assert memory.models("k0") == ()
    assert memory.models(f"k{MOST_KINDS + 4}") == ("m",)


def test_a_memory_can_begin_with_what_all_workflows_of_another_did() -> None:
    memory = RemainingMemory(taught(long=[20] * 60).common())
    assert calls_left(memory, "unseen", 1) == pytest.approx(19.0, abs=2.0)
    for _ in range(300):
        memory.learn("short", a_trail(3), ended_s=6.0)
    assert calls_left(memory, "unseen", 1) < 10.0
    with pytest.raises(PredictorError, match="every_model"):
        RemainingMemory({"every_model": np.zeros((3, 2))})


def test_an_old_habit_is_forgotten() -> None:
    memory = taught(k=[20] * 500)
    for _ in range(800):
        memory.learn("k", a_trail(3), ended_s=6.0)
    assert calls_left(memory, "k", 1) < 5.0


def test_an_unknown_clock_teaches_nothing_about_seconds() -> None:
    memory = RemainingMemory()
    before = memory.recall("k", EVERY_MODEL, 1, 1)[2]
    memory.learn("k", a_trail(5, second_s=math.nan), ended_s=math.nan)
    after = memory.recall("k", EVERY_MODEL, 1, 1)
    assert after[2].mean == pytest.approx(before.mean)
    assert after[0].evidence > 0.0


@given(lengths=st.lists(st.integers(1, 600), max_size=5), arrived=st.integers(0, 2000), ended=st.integers(0, 2000))
def test_what_is_recalled_is_always_finite(lengths: list[int], arrived: int, ended: int) -> None:
    memory = taught(k=lengths)
    for kind in ("k", "unseen"):
        recalled = memory.recall(kind, EVERY_MODEL, arrived, ended)
        assert all(math.isfinite(number) for known in recalled for number in known)
        assert all(known.spread >= 0.0 and -1e-9 <= known.ending <= 1.0 + 1e-9 for known in recalled)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "finish", "fail", "answer", "retry", "mark"]),
        st.sampled_from(["a", "b", ""]),
        NUMBERS,
        NUMBERS,
    ),
    max_size=30,
)


def played(events: list[tuple[str, str, float, float]]) -> WorkflowSoFar:
    w = WorkflowSoFar(kind="k", submitted_at_s=5.0)
    for what, name, number, at_s in events:
        match what:
            case "arrive":
                w.call_arrived(role=name, model=name, prompt_tokens=number, at_s=at_s)
            case "finish":
                w.call_finished(model=name, output_tokens=number, at_s=at_s)
            case "fail":
                w.call_failed(at_s)
            case "answer":
                w.answered(name)
            case "retry":
                w.call_retried()
            case _:
                w.marked(marks_of(name))
    return w


@given(events=EVENTS, seed=st.integers(0, 20), model=st.sampled_from([EVERY_MODEL, "a", "unseen"]))
def test_a_forecast_is_finite_and_monotone_and_never_negative_and_the_same_again(
    events: list[tuple[str, str, float, float]], seed: int, model: str
) -> None:
    memory, heads = taught(k=[3, 9]), random_heads(seed, size=2.0)
    rows = []
    for _ in range(2):
        w = played(events)
        recalled = memory.recall("k", model, w.arrived, w.done)
        rows.append(features(w, recalled, recalled[0], model=model))
    assert np.array_equal(rows[0], rows[1], equal_nan=True)
    assert rows[0].shape == (len(FEATURES),)
    for quantity, head in heads.items():
        forecast = head.forecast(rows[0], anchor(recalled, quantity))
        assert all(math.isfinite(q) and q >= 0.0 for q in forecast.quantiles)
        assert all(a <= b for a, b in itertools.pairwise(forecast.quantiles))
        assert forecast.unit == SPECS[quantity].unit


def test_what_nobody_looked_at_is_unknown_and_not_zero() -> None:
    w = WorkflowSoFar(kind="k", submitted_at_s=0.0)
    recalled = RemainingMemory().recall("k", EVERY_MODEL, 0, 0)
    row = dict(zip(FEATURES, features(w, recalled, recalled[0]).tolist(), strict=True))
    for group in OPTIONAL.values():
        assert all(math.isnan(row[name]) for name in group)
    w.call_arrived(role="r", model="m", prompt_tokens=10.0, at_s=1.0, marks=marks_of("Thank you!"))
    w.call_finished(model="m", output_tokens=3.0, at_s=2.0, tool="search")
    row = dict(zip(FEATURES, features(w, recalled, recalled[0]).tolist(), strict=True))
    assert (row["text_thanks"], row["asks_tool"], row["elapsed"]) == (1.0, 1.0, pytest.approx(math.log1p(2.0)))


def test_a_model_that_was_not_called_yet_has_no_share() -> None:
    w, recalled = a_workflow(4), RemainingMemory().recall("k", "other", 4, 4)
    row = dict(zip(FEATURES, features(w, recalled, recalled[0], model="other").tolist(), strict=True))
    assert (row["of_one_model"], row["model_share"], row["model_is_last"]) == (1.0, 0.0, 0.0)


def test_a_workflow_of_a_thousand_names_stays_small() -> None:
    w = WorkflowSoFar(kind="k", submitted_at_s=0.0)
    for i in range(1000):
        w.call_arrived(role=f"r{i}", model=f"m{i}", prompt_tokens=1.0, at_s=float(i))
        w.call_finished(model=f"m{i}", output_tokens=1.0, at_s=float(i), tool=f"t{i}")
    assert max(len(w.roles), len(w.models), len(w.tools)) <= MOST_NAMES + 1
    assert (w.arrived, w.done, w.output_tokens) == (1000, 1000, 1000.0)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("You're welcome! Have a great day!", "farewell"),
        ("Muchas gracias", "thanks"),
        ("Du wirst weitergeleitet: weiterleitung", "hand_over"),
        ("Traceback (most recent call last)", "error"),
        ("###STOP###", "stop"),
        ("Is there anything else?", "more"),
        ('{"status": "ok"}', "machine"),
    ],
)
def test_words_of_ending_are_marked(text: str, mark: str) -> None:
    assert dict(zip(MARKS, marks_of(text), strict=True))[mark] == 1.0
    assert dict(zip(MARKS, marks_of("Where do the swallows fly"), strict=True))[mark] == 0.0


@given(text=st.one_of(st.binary(max_size=2000), st.text(max_size=2000)))
def test_any_text_has_finite_marks(text: bytes | str) -> None:
    marks = marks_of(text)
    assert len(marks) == len(MARKS)
    assert all(math.isfinite(mark) and mark >= 0.0 for mark in marks)


def test_the_units_are_those_of_the_quantities() -> None:
    assert [SPECS[quantity].unit for quantity in QUANTITIES] == ["calls", "tokens", "s"]
    assert len({spec.key for spec in SPECS.values()}) == 3


def test_heads_asked_together_say_what_each_says_alone() -> None:
    rng, heads = np.random.default_rng(1), list(random_heads(3).values())
    heads[1] = replace(heads[1], nets=(*heads[1].nets, *random_heads(4)["work"].nets), limit=2.0)
    shift = np.linspace(-0.5, 0.5, len(heads[2].spec.levels)).astype(np.float32)
    heads[2] = replace(heads[2], shifts={"": 0 * shift, "k": shift})
    rows = rng.normal(size=(5, len(FEATURES))).astype(np.float32)
    rows[0, :7] = np.nan
    anchors = rng.normal(size=(3, 5))
    together = FusedHeads(heads).log_quantiles(rows, anchors, "k")
    for i, head in enumerate(heads):
        assert np.allclose(together[i], head.log_quantiles(rows, anchors[i], "k"), atol=1e-4)

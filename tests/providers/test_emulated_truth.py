"""What an emulated call answers: recorded where it can be, labelled filler otherwise, and always the same."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from swarmx.core.errors import ConfigError
from swarmx.core.prompt_key import prompt_key
from swarmx.providers.emulated.schema import minimal, satisfies
from swarmx.providers.emulated.truth import (
    BYTES_PER_TOKEN,
    LengthFactors,
    Prompt,
    Recorded,
    SizeClass,
    Truth,
    length_factors,
    prefix_hashes,
    prompt_tokens,
    recorded,
)

WRITER = "You write."
PLANNER = "You plan."
STEPS = {
    "type": "object",
    "properties": {"steps": {"type": "array", "minItems": 1, "items": {"type": "string", "maxLength": 9}}},
    "required": ["steps"],
    "additionalProperties": False,
}
FACTORS = LengthFactors(
    classes={"8b": SizeClass(offset=0.5, predictive_slope=0.5, predictive_residual_sd=0.3)}, run_noise_sd=0.2
)


def row(system: str, user: str, tokens: int, reply: object = None) -> Recorded:
    return Recorded(
        key=prompt_key(system, user),
        system_key=prompt_key(system, ""),
        role=system,
        model="recorded",
        prompt_tokens=9,
        output_tokens=tokens,
        finish_reason="stop",
        reply=reply,
    )


ROWS = [
    row(WRITER, "short", 20),
    row(WRITER, "long", 500),
    row(PLANNER, "plan", 12, {"steps": ["a", "b"]}),
]


def prompt(system: str, user: str, *, limit: int = 4000, schema: dict[str, object] | None = None) -> Prompt:
    return Prompt(system=system, user=user, text=f"{system}\n{user}", max_tokens=limit, schema=schema)


def test_a_recorded_prompt_gets_its_recorded_length() -> None:
    truth = Truth(rows=ROWS, model="m")
    assert len(truth.answer(prompt(WRITER, "short\n\nwith other context")).pieces) == 20
    assert len(truth.answer(prompt(WRITER, "long")).pieces) == 500


def test_an_unknown_job_gets_a_row_of_the_same_instructions() -> None:
    truth = Truth(rows=ROWS, model="m")
    lengths = {len(truth.answer(prompt(WRITER, f"job {i}")).pieces) for i in range(40)}
    assert lengths == {20, 500}
    assert truth.answer(prompt(PLANNER, "another")) == truth.answer(prompt(PLANNER, "plan"))


def test_unknown_instructions_get_any_row_as_free_text() -> None:
    truth = Truth(rows=ROWS, model="m")
    answers = [truth.answer(prompt("You sing.", f"job {i}")) for i in range(60)]
    assert {len(a.pieces) for a in answers} == {12, 20, 500}
    assert all(a.pieces[0] == "[emulated]" for a in answers)


def test_the_same_seed_gives_the_same_answer_and_another_seed_another_run() -> None:
    def lengths(seed: int) -> list[int]:
        truth = Truth(rows=ROWS, model="m", factors=FACTORS, size_class="8b", seed=seed)
        return [len(truth.answer(prompt(WRITER, "long", limit=9000)).pieces), len(truth.answer(ASKED).pieces)]

    assert lengths(1) == lengths(1)
    assert lengths(1) != lengths(2)


ASKED = prompt(WRITER, "short\n\nx", limit=9000)


def test_a_size_class_stretches_around_the_mean_of_the_role() -> None:
    truth = Truth(rows=ROWS, model="m", factors=FACTORS, size_class="8b")
    logs = [
        math.log(len(truth.answer(prompt(WRITER, f"long\n\ncontext {i}", limit=99_999)).pieces)) for i in range(400)
    ]
    pivot = (math.log(20) + math.log(500)) / 2
    assert statistics.mean(logs) == pytest.approx(pivot + 0.5 + 0.5 * (math.log(500) - pivot), abs=0.05)
    assert statistics.stdev(logs) == pytest.approx(0.3, abs=0.04)


def test_the_reference_class_only_has_run_noise() -> None:
    truth = Truth(rows=ROWS, model="m", factors=FACTORS)
    logs = [math.log(len(truth.answer(prompt(WRITER, f"long\n\n{i}", limit=99_999)).pieces)) for i in range(400)]
    assert statistics.mean(logs) == pytest.approx(math.log(500), abs=0.04)
    assert statistics.stdev(logs) == pytest.approx(0.2, abs=0.03)


def test_an_answer_is_cut_at_max_tokens() -> None:
    answer = Truth(rows=ROWS, model="m").answer(prompt(WRITER, "long", limit=7))
    assert (len(answer.pieces), answer.finish_reason) == (7, "length")
    whole = Truth(rows=ROWS, model="m").answer(prompt(WRITER, "long", limit=500))
    assert (len(whole.pieces), whole.finish_reason) == (500, "stop")


def test_ignore_eos_gives_exactly_max_tokens() -> None:
    asked = Prompt(system=WRITER, user="short", text="t", max_tokens=333, ignore_eos=True)
    answer = Truth(rows=ROWS, model="m").answer(asked)
    assert (len(answer.pieces), answer.finish_reason) == (333, "length")


def test_filler_is_labelled_and_has_about_the_bytes_of_real_tokens() -> None:
    text = "".join(Truth(rows=ROWS, model="m").answer(prompt(WRITER, "long")).pieces)
    assert text.startswith("[emulated] ")
    assert len(text) / 500 == pytest.approx(BYTES_PER_TOKEN, rel=0.1)


def test_a_structured_role_answers_with_the_recorded_reply_and_its_token_count() -> None:
    truth = Truth(rows=ROWS, model="m", factors=FACTORS, size_class="8b")
    answer = truth.answer(prompt(PLANNER, "plan", schema=STEPS))
    assert json.loads("".join(answer.pieces)) == {"steps": ["a", "b"]}
    assert (len(answer.pieces), answer.finish_reason) == (12, "stop")


def test_a_reply_that_breaks_the_schema_gives_way_to_a_minimal_one() -> None:
    rows = [row(PLANNER, "plan", 12, {"steps": ["much too long for it"]})]
    answer = Truth(rows=rows, model="m").answer(prompt(PLANNER, "plan", schema=STEPS))
    assert json.loads("".join(answer.pieces)) == {"steps": [""]}


def test_without_recordings_there_is_no_truth() -> None:
    with pytest.raises(ConfigError, match="no recorded answers"):
        Truth(rows=[], model="m")


def test_an_unknown_size_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="'9b' is unknown, expected one of 8b, small"):
        Truth(rows=ROWS, model="m", factors=FACTORS, size_class="9b")


def test_the_fitted_size_classes_can_be_read() -> None:
    assert {"8b", "70b"} <= set(length_factors().classes)


def test_recordings_are_read_in_order_and_a_broken_line_is_named(tmp_path: Path) -> None:
    line = {"key": "k", "model": "m", "prompt_tokens": 1, "output_tokens": 2, "finish_reason": "stop", "reply": None}
    (tmp_path / "b.jsonl").write_text(json.dumps(line | {"model": "second"}) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(line | {"model": "first", "task_id": "extra"}) + "\n")
    assert [r.model for r in recorded(tmp_path)] == ["first", "second"]
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"c\.jsonl:1"):
        recorded(tmp_path)


def test_prefix_hashes_agree_exactly_as_far_as_the_texts_do() -> None:
    common = "same words " * 60
    one, other = prefix_hashes(common + "x" * 400, 64), prefix_hashes(common + "y" * 400, 64)
    shared = len(common) // 288
    assert one[:shared] == other[:shared]
    assert one[shared] != other[shared]
    assert len(one) <= prompt_tokens(common + "x" * 400) // 64


@pytest.mark.parametrize(
    "schema",
    [
        STEPS,
        {"enum": ["approve", "revise"]},
        {"const": 3},
        {"type": "string", "minLength": 3},
        {"type": "integer", "minimum": 5},
        {"type": "number", "maximum": -1.5},
        {"type": "boolean"},
        {"type": ["null", "string"]},
        {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
        {"$defs": {"n": {"type": "integer"}}, "type": "array", "minItems": 2, "items": {"$ref": "#/$defs/n"}},
        {"type": "object", "properties": {"a": {"type": "object", "required": ["b"]}}, "required": ["a"]},
        {},
    ],
)
def test_a_minimal_value_satisfies_its_schema(schema: dict[str, object]) -> None:
    assert satisfies(minimal(schema), schema)


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"steps": []}, STEPS),
        ({"steps": ["a"], "more": 1}, STEPS),
        ({}, STEPS),
        (True, {"type": "integer"}),
        ("z", {"enum": ["a"]}),
        ({"a": 1}, {"additionalProperties": {"type": "string"}}),
        (7, {"anyOf": [{"type": "string"}, {"maximum": 3}]}),
    ],
)
def test_a_wrong_value_does_not(value: object, schema: dict[str, object]) -> None:
    assert not satisfies(value, schema)

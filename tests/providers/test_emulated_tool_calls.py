"""Which tool an emulated model calls."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from swarmx.providers.emulated.schema import satisfies
from swarmx.providers.emulated.tool_calls import CALLED_OF_FOUR, Choice, Function, Tool, tool_call
from swarmx.providers.emulated.truth import Answer

SCHEMA = {
    "type": "object",
    "required": ["path", "lines"],
    "properties": {"path": {"type": "string", "minLength": 1}, "lines": {"type": "array", "minItems": 2, "items": {}}},
    "additionalProperties": False,
}
TOOLS = [
    Tool(type="function", function=Function(name="read", parameters=SCHEMA)),
    Tool(type="function", function=Function(name="list")),
]


def ask(text: str, choice: Choice | None = None, *, model: str = "m", seed: int = 0, most: int = 999) -> Answer | None:
    return tool_call(TOOLS, choice, text=text, model=model, seed=seed, max_tokens=most)


def test_the_same_prompt_model_and_seed_call_the_same_tool() -> None:
    texts = [str(i) for i in range(200)]
    assert [ask(text) for text in texts] == [ask(text) for text in texts]
    assert [ask(text) for text in texts] != [ask(text, seed=1) for text in texts]
    assert [ask(text) for text in texts] != [ask(text, model="n") for text in texts]


def test_a_free_model_calls_a_tool_in_three_answers_of_four_and_each_tool_as_often() -> None:
    called = Counter(None if (answer := ask(str(i))) is None else answer.tool for i in range(4000))
    assert called[None] == pytest.approx(4000 * (4 - CALLED_OF_FOUR) / 4, rel=0.1)
    assert called["read"] == pytest.approx(called["list"], rel=0.1)


def test_arguments_meet_the_schema() -> None:
    answers = [answer for i in range(50) if (answer := ask(str(i), "required")) is not None]
    assert len(answers) == 50
    for answer in answers:
        arguments = msgspec.json.decode("".join(answer.pieces))
        assert satisfies(arguments, SCHEMA) if answer.tool == "read" else arguments == {}


@pytest.mark.parametrize("text", [str(i) for i in range(20)])
def test_no_tool_is_called_against_the_choice(text: str) -> None:
    assert ask(text, "none") is None
    assert tool_call([], "required", text=text, model="m", seed=0, max_tokens=9) is None


def test_an_answer_is_never_longer_than_allowed() -> None:
    whole, cut = ask("x", "required"), ask("x", "required", most=1)
    assert whole is not None
    assert cut is not None
    assert (len(cut.pieces), cut.finish_reason, whole.finish_reason) == (1, "length", "tool_calls")
    assert cut.pieces == whole.pieces[:1]

"""What requests and answers of any shape tell."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.compat.ray_serve.answered import StreamedWork, work_of
from swarmx.compat.ray_serve.asked import call_from, size_of
from swarmx.core.nouns import Call
from swarmx.core.prompts import PromptText


class Request:
    """As Ray Serve LLM's, an object with the fields of an OpenAI body."""

    def __init__(self, messages: Sequence[Any], max_tokens: Any = None) -> None:
        self.messages = messages
        self.max_tokens = max_tokens

    @property
    def text(self) -> str:
        raise AssertionError("a property is not touched: it could do anything")


class Message:
    def __init__(self, role: str, content: Any) -> None:
        self.role = role
        self.content = content


def read(*args: Any, **kwargs: Any) -> tuple[Call, PromptText]:
    return call_from(
        args, kwargs, deployment="app/m", method="chat", workflow_id="w", workflow_kind="/chat", session="s"
    )


@pytest.mark.parametrize(
    "asked",
    [
        "tell me a story",
        b"tell me a story",
        {"prompt": "tell me a story"},
        {"inputs": {"text": "tell me a story"}},
        {"messages": [{"role": "user", "content": "tell me a story"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "tell me a story"}]}]},
        Request([{"role": "user", "content": "tell me a story"}]),
        Request([Message("user", "tell me a story")]),
        ["tell me a story"],
        {"anything": "tell me a story"},
    ],
    ids=lambda shape: type(shape).__name__,
)
def test_the_prompt_is_found_in_arguments_of_many_shapes(asked: Any) -> None:
    call, prompt = read(asked)
    assert prompt.text == b"tell me a story"
    assert call.model == "app/m"
    assert call.session == "s"
    assert size_of((asked,), {}) == len("tell me a story")
    _, by_name = read(request=asked)
    assert by_name.text == prompt.text


def test_the_limit_and_the_role_are_those_of_the_request() -> None:
    call, _ = read(Request([Message("system", "You plan."), Message("user", "go")], max_tokens=64))
    other, _ = read(Request([Message("system", "You write."), Message("user", "go")], max_tokens=64))
    assert call.work_limit == 64.0
    assert call.role.startswith("chat-")
    assert call.role != other.role


def test_a_limit_that_no_engine_would_take_is_left_to_the_deployment() -> None:
    call, prompt = read({"messages": [{"role": "user", "content": "go"}], "max_tokens": -1})
    assert prompt.text == b"go"
    assert call.work_limit > 1.0


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["messages", "prompt", "x"]), inner),
    max_leaves=8,
)


@given(_ANYTHING)
def test_no_argument_is_too_odd_to_be_routed(asked: Any) -> None:
    call, prompt = read(asked)
    assert call.prompt_tokens >= 1
    assert prompt.total_bytes >= 0
    size_of((asked,), {})


@given(_ANYTHING)
def test_the_work_of_any_answer_is_a_positive_number_or_unknown(answer: Any) -> None:
    work = work_of(answer)
    assert work is None or work > 0.0


def test_the_work_is_what_usage_says_before_the_length_of_the_text() -> None:
    assert work_of({"usage": {"completion_tokens": 7}, "text": "x" * 400}) == 7.0
    assert work_of({"text": "x" * 400}) == 100.0
    assert work_of("x" * 40) == 10.0
    assert work_of({"usage": None, "n": 3}) is None


class Lazy(Mapping[str, Any]):
    """An answer that cannot be looked at."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("not loaded")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_looking_at_an_answer_never_loses_it() -> None:
    assert work_of(Lazy()) is None


def streamed(*parts: Any) -> float | None:
    stream = StreamedWork()
    for part in parts:
        stream.add(part)
    return stream.total()


def test_a_stream_is_as_many_tokens_as_parts_unless_its_usage_says_otherwise() -> None:
    assert streamed() is None
    assert streamed("a", "b", b"c") == 3.0
    assert streamed({"usage": {"completion_tokens": 70}}) == 70.0  # a whole answer, as Serve LLM streams it
    event, last = 'data: {"choices": [{}]}\n\n', 'data: {"usage": {"completion_tokens": 9}}\n\n'
    assert streamed([event, event], [event], ["data: [DONE]\n\n"]) == 3.0
    assert streamed(event + event, [event, last, "data: [DONE]\n\n"]) == 9.0


def test_a_whole_answer_is_known_from_the_first_part_of_its_stream_and_a_piece_is_none() -> None:
    usage = {"usage": {"completion_tokens": 7}}
    for first, whole in ((usage, 7.0), ([usage], None), ("word", None), ('data: {"usage": {}}\n\n', None)):
        stream = StreamedWork()
        stream.add(first)
        assert stream.whole == whole
        stream.add({"usage": {"completion_tokens": 70}})
        assert stream.whole == whole


@given(st.lists(_ANYTHING, max_size=4))
def test_the_work_of_any_stream_is_a_positive_number_or_unknown(parts: list[Any]) -> None:
    work = streamed(*parts)
    assert work is None or work > 0.0
    assert streamed(Lazy()) is not None

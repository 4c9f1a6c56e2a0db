"""A long conversation is shortened so that it fits, makes sense to a model, and changes as seldom as can be."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.workflows.agent_context import Message, Round, shown
from swarmx.workflows.spending import prompt_estimate

FIRST: list[Message] = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Find the fault."}]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
TEXTS = st.builds(lambda text, times: text * times, st.sampled_from(["word ", "\n", "é", "猫"]), st.integers(0, 900))


def used(*results: str, step: int = 1, text: str | None = None, prompt_tokens: int | None = None) -> Round:
    """A step that asked for tools, with what each left."""
    ids = [f"id-{step}-{number}" for number in range(len(results))]
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    return Round(
        said={"role": "assistant", "content": text, "tool_calls": [call | {"id": id} for id in ids]},
        followed=tuple(
            {"role": "tool", "tool_call_id": id, "content": result} for id, result in zip(ids, results, strict=True)
        ),
        prompt_tokens=prompt_tokens,
    )


def reminded(text: str, *, prompt_tokens: int | None = None) -> Round:
    """A step that gave no answer of use."""
    return Round(
        said={"role": "assistant", "content": text},
        followed=({"role": "user", "content": "Call `answer`."},),
        prompt_tokens=prompt_tokens,
    )


@st.composite
def conversations(draw: st.DrawFn, counts: st.SearchStrategy[int | None]) -> list[Round]:
    rounds = []
    for step in range(draw(st.integers(0, 14))):
        if draw(st.integers(0, 5)) == 0:
            rounds.append(reminded(draw(TEXTS), prompt_tokens=draw(counts)))
        else:
            results = draw(st.lists(TEXTS, min_size=1, max_size=3))
            rounds.append(used(*results, step=step, text=draw(TEXTS), prompt_tokens=draw(counts)))
    return rounds


ANY_COUNTS = st.one_of(st.none(), st.integers(0, 6000), st.just(2**53 - 1))
ROOM = st.integers(150, 4000)


def whole(rounds: list[Round]) -> list[Message]:
    return [message for item in rounds for message in (item.said, *item.followed)]


def tokens(messages: list[Message]) -> int:
    return prompt_estimate({"messages": messages, "tools": TOOLS})


def orphans(messages: list[Message]) -> list[str]:
    """The ids of results without their call right before them, and of calls without their results right after."""
    open_ids: list[str] = []
    found: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] in open_ids:
                open_ids.remove(message["tool_call_id"])
            else:
                found.append(message["tool_call_id"])
        else:
            found += open_ids
            open_ids = [call["id"] for call in message.get("tool_calls", ())]
    return found + open_ids


@settings(max_examples=60, deadline=None)
@given(rounds=conversations(ANY_COUNTS), most=ROOM)
def test_what_is_shown_fits_unless_no_more_than_the_task_and_the_last_step_is_left(
    rounds: list[Round], most: int
) -> None:
    messages = shown(FIRST, rounds, TOOLS, most)
    if tokens(messages) > most:
        assert len(messages) == len(FIRST) + len(whole(rounds[-1:]))


@settings(max_examples=60, deadline=None)
@given(rounds=conversations(ANY_COUNTS), most=ROOM)
def test_the_task_and_the_last_step_are_always_there_and_no_result_is_without_its_call(
    rounds: list[Round], most: int
) -> None:
    messages = shown(FIRST, rounds, TOOLS, most)
    system, task = messages[:2]
    assert system == FIRST[0]
    assert task["role"] == "user"
    assert task["content"].startswith(FIRST[1]["content"])
    last = whole(rounds[-1:])
    assert messages[len(messages) - len(last) :] == last
    assert orphans(messages) == []
    roles = [message["role"] for message in messages if message["role"] != "tool"]
    assert all(before != after or before == "assistant" for before, after in pairwise(roles))


@settings(max_examples=60, deadline=None)
@given(rounds=conversations(ANY_COUNTS), most=ROOM)
def test_the_oldest_go_first_and_what_is_left_out_stays_out(rounds: list[Round], most: int) -> None:
    left_before = 0
    for count in range(len(rounds) + 1):
        messages = shown(FIRST, rounds[:count], TOOLS, most)
        there = [message for message in messages[2:] if message["role"] == "assistant"]
        assert there == [item.said for item in rounds[count - len(there) : count]], "rounds go from the front"
        results = [message for message in messages if message["role"] == "tool"]
        meant = [message for item in rounds[count - len(there) : count] for message in item.followed]
        same = [result in meant for result in results]
        shortened = [result["content"].startswith("[Left out to save room: ") for result in results]
        assert [was or is_short for was, is_short in zip(same, shortened, strict=True)] == [True] * len(results)
        left = sum(len(item.followed) for item in rounds[: count - len(there)]) + sum(shortened)
        assert left >= left_before
        left_before = left


@settings(max_examples=60, deadline=None)
@given(rounds=conversations(st.none()), most=ROOM)
def test_a_prompt_only_grows_at_its_end_as_long_as_it_fits(rounds: list[Round], most: int) -> None:
    before = shown(FIRST, [], TOOLS, most)
    for count in range(1, len(rounds) + 1):
        messages = shown(FIRST, rounds[:count], TOOLS, most)
        grown = before + whole(rounds[count - 1 : count])
        if tokens(grown) < most * 0.95:
            assert messages == grown
        before = messages


def test_nothing_is_left_out_where_nobody_knows_the_context() -> None:
    rounds = [used("x" * 100_000, step=step) for step in range(9)]
    assert shown(FIRST, rounds, TOOLS, None) == FIRST + whole(rounds)


def test_old_results_are_named_by_their_length_until_a_quarter_of_the_room_is_free() -> None:
    rounds = [used("x" * 2000, step=step, text="Next.") for step in range(8)]
    before, after = (shown(FIRST, rounds[:count], TOOLS, 4000) for count in (7, 8))
    assert before == FIRST + whole(rounds[:7])
    contents = [message["content"] for message in after if message["role"] == "tool"]
    assert contents == ["[Left out to save room: 2000 characters.]"] * 3 + ["x" * 2000] * 5
    assert tokens(after) <= 3000


def test_whole_rounds_go_where_old_results_do_not_make_enough_room() -> None:
    rounds = [used("ok", step=step, text="y" * 2000) for step in range(8)]
    messages = shown(FIRST, rounds, TOOLS, 4000)
    note = "\n\n[Left out to save room: the first 3 steps are not shown.]"
    assert messages == [FIRST[0], FIRST[1] | {"content": f"Find the fault.{note}"}, *whole(rounds[3:])]


def test_the_last_three_steps_stay_as_they_were_while_older_ones_can_make_room() -> None:
    rounds = [used("x" * 4000, step=step, text="y" * 400) for step in range(12)]
    messages = shown(FIRST, rounds, TOOLS, 4200)
    assert messages[-6:] == whole(rounds[-3:])


def test_where_the_last_steps_alone_are_long_no_more_is_left_out_than_has_to_be() -> None:
    rounds = [used("x" * size, step=step) for step, size in enumerate((2000, 2000, 4500, 4500, 4500))]
    messages = shown(FIRST, rounds, TOOLS, 4200)
    contents = [message["content"] for message in messages if message["role"] == "tool"]
    assert [len(content) for content in contents] == [41, 2000, 4500, 4500, 4500]


def test_the_engines_own_count_is_believed_where_a_text_has_more_tokens_than_its_bytes_suggest() -> None:
    def left_out(off: float) -> list[str]:
        rounds: list[Round] = []
        for step in range(6):
            asked = tokens(shown(FIRST, rounds, TOOLS, 4000))
            rounds.append(used("7" * 2000, step=step, prompt_tokens=int(asked * off)))
        messages = shown(FIRST, rounds, TOOLS, 4000)
        return [message["content"] for message in messages if message["content"] and message["content"][0] == "["]

    assert left_out(1.0) == left_out(0.3) == [], "what is estimated to have 3300 tokens fits"
    assert left_out(1.6) == ["[Left out to save room: 2000 characters.]"] * 2


def test_a_short_prompt_says_nothing_about_the_tokens_of_a_text() -> None:
    rounds = [used("7" * 2000, step=step, prompt_tokens=6000 if step == 0 else None) for step in range(6)]
    assert shown(FIRST, rounds, TOOLS, 4000) == FIRST + whole(rounds)


def test_steps_of_equal_length_seldom_change_what_the_engine_has_read() -> None:
    rounds = [used("x" * 1000, step=step, text="y" * 100) for step in range(50)]
    changed = 0
    before = shown(FIRST, [], TOOLS, 8000)
    for count in range(1, 51):
        messages = shown(FIRST, rounds[:count], TOOLS, 8000)
        changed += messages[: len(before)] != before
        before = messages
    assert 1 <= changed <= 6, "of 25 steps that are too long as they are"

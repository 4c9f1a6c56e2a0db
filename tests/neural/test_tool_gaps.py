"""How long tools take, learnt from the pauses of workflows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.forecast import LEVELS, Forecast
from swarmx.neural import tool_gaps
from swarmx.neural.tool_gaps import MOST_CONVERSATIONS, MOST_PAUSED, MOST_TOOLS, Gap, ToolGaps


def teach(gaps: ToolGaps, tool: str, *seconds: float) -> None:
    for gap_s in seconds:
        gaps.asked("teacher", "c", (tool,), 100.0)
        assert gaps.called("teacher", "c", returns_tools=True, now_s=100.0 + gap_s) is not None


def expected(gaps: ToolGaps, *tools: str) -> Forecast:
    found = gaps.expected(tools)
    assert found is not None
    return found


def pinball(quantiles: np.ndarray, outcome: float) -> float:
    """Mean over the levels, of the logarithm."""
    short = np.log1p(outcome) - np.log1p(quantiles)
    return float(np.mean(np.maximum(np.array(LEVELS) * short, (np.array(LEVELS) - 1.0) * short)))


def test_before_any_gap_was_seen_nobody_can_say() -> None:
    gaps = ToolGaps()
    gaps.asked("w", "c", ("grep",), 0.0)
    assert gaps.expected(["grep"]) is None
    assert gaps.pause("w", 1.0) is None


def test_a_gap_is_the_time_from_the_answer_to_the_call_with_the_results() -> None:
    gaps = ToolGaps()
    gaps.asked("w", "c", ("grep", "read"), 10.0)
    assert gaps.called("w", "c", returns_tools=True, now_s=12.5) == Gap(tools=("grep", "read"), gap_s=2.5)
    assert gaps.called("w", "c", returns_tools=True, now_s=13.0) is None


def test_a_call_that_brings_no_results_teaches_nothing() -> None:
    gaps = ToolGaps()
    gaps.asked("w", "c", ("grep",), 10.0)
    assert gaps.called("w", "c", returns_tools=False, now_s=99.0) is None
    assert gaps.called("w", "c", returns_tools=True, now_s=99.0) is None
    assert gaps.expected(["grep"]) is None


def test_an_answer_to_read_ends_the_wait() -> None:
    gaps = ToolGaps()
    gaps.asked("w", "c", ("grep",), 10.0)
    gaps.asked("w", "c", (), 11.0)
    assert gaps.called("w", "c", returns_tools=True, now_s=12.0) is None


def test_parallel_conversations_of_a_workflow_are_told_apart() -> None:
    gaps = ToolGaps()
    gaps.asked("w", "a", ("slow",), 0.0)
    gaps.asked("w", "b", ("fast",), 5.0)
    assert gaps.called("w", "b", returns_tools=True, now_s=6.0) == Gap(tools=("fast",), gap_s=1.0)
    assert gaps.called("w", "a", returns_tools=True, now_s=9.0) == Gap(tools=("slow",), gap_s=9.0)


def test_a_clock_that_goes_back_gives_no_negative_gap() -> None:
    gaps = ToolGaps()
    gaps.asked("w", "c", ("grep",), 10.0)
    assert gaps.called("w", "c", returns_tools=True, now_s=4.0) == Gap(tools=("grep",), gap_s=0.0)


def test_a_tool_is_known_better_than_a_constant_after_ten_turns() -> None:
    rng = np.random.default_rng(5)
    draws = {"grep": rng.lognormal(-1.0, 0.4, 210), "build": rng.lognormal(3.0, 0.4, 210)}
    gaps = ToolGaps()
    for turn in range(10):
        for tool, seconds in draws.items():
            teach(gaps, tool, float(seconds[turn]))
    # The best that one constant distribution can do, told all that is to come.
    constant = np.quantile(np.concatenate([seconds[10:] for seconds in draws.values()]), LEVELS)
    for tool, seconds in draws.items():
        learnt = np.array(expected(gaps, tool).quantiles)
        ours = np.mean([pinball(learnt, float(s)) for s in seconds[10:]])
        theirs = np.mean([pinball(constant, float(s)) for s in seconds[10:]])
        assert ours < 0.5 * theirs


def test_an_unknown_tool_takes_what_tools_take() -> None:
    gaps = ToolGaps()
    teach(gaps, "grep", *[1.0] * 20)
    assert expected(gaps, "unheard").quantiles == (1.0,) * len(LEVELS)


def test_a_tool_that_has_changed_is_learnt_anew() -> None:
    gaps = ToolGaps()
    teach(gaps, "grep", *[1.0] * 200, *[50.0] * 64)
    assert expected(gaps, "grep").quantile(0.5) == pytest.approx(50.0)


def test_several_tools_take_as_long_as_the_slowest() -> None:
    gaps = ToolGaps()
    teach(gaps, "grep", *[1.0] * 20)
    teach(gaps, "build", *[60.0] * 20)
    assert expected(gaps, "grep", "build").quantile(0.5) == expected(gaps, "build").quantile(0.5)


def test_an_answer_with_several_tools_teaches_none_of_them_by_name() -> None:
    gaps = ToolGaps()
    gaps.asked("w", "c", ("grep", "build"), 0.0)
    gaps.called("w", "c", returns_tools=True, now_s=60.0)
    assert len(gaps) == 0
    assert expected(gaps, "grep").quantile(0.5) == 60.0


def test_a_pause_tells_how_much_of_it_has_gone_by() -> None:
    gaps = ToolGaps()
    teach(gaps, "grep", *[8.0] * 20)
    gaps.asked("w", "c", ("grep",), 100.0)
    assert gaps.pause("w", 103.0) == (expected(gaps, "grep"), 3.0)
    gaps.ended("w")
    assert gaps.pause("w", 103.0) is None
    gaps.ended("w")


def test_memory_is_bounded_and_what_is_used_stays() -> None:
    gaps = ToolGaps()
    for i in range(MOST_TOOLS + 50):
        teach(gaps, "used", 1.0)
        teach(gaps, f"tool-{i}", 1.0)
    assert len(gaps) == MOST_TOOLS
    assert gaps.expected(["used"]) is not None
    for i in range(MOST_PAUSED + 50):
        gaps.asked(f"w{i}", "c", ("used",), 0.0)
    assert gaps.pause("w0", 1.0) is None
    assert gaps.pause(f"w{MOST_PAUSED + 49}", 1.0) is not None
    for i in range(MOST_CONVERSATIONS + 1):
        gaps.asked("many", str(i), ("used",), 0.0)
    assert gaps.called("many", "0", returns_tools=True, now_s=1.0) is None
    assert gaps.called("many", "1", returns_tools=True, now_s=1.0) is not None


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=tool_gaps.MOST_GAPS + 9))
def test_whatever_was_seen_the_forecast_is_one_and_within_what_was_seen(seconds: list[float]) -> None:
    gaps = ToolGaps()
    teach(gaps, "grep", *seconds)
    quantiles = expected(gaps, "grep").quantiles
    assert min(seconds) - 1e-6 <= quantiles[0]
    assert quantiles[-1] <= max(seconds) + 1e-6

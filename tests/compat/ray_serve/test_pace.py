"""How fast a replica is, learnt from its calls, here and beside it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.compat.ray_serve.beside import Beside
from swarmx.compat.ray_serve.known_replica import KnownReplica, differs
from swarmx.compat.ray_serve.pace import Pace
from swarmx.core.engine import EngineProfile
from swarmx.core.nouns import Replica

FIRST = EngineProfile(model="m", device="ray", step_base_s=0.02)


def test_a_few_calls_tell_how_long_a_unit_of_work_takes_alone_and_among_others() -> None:
    rng = np.random.default_rng(0)
    pace = Pace(FIRST)
    for _ in range(60):
        work, batch = float(rng.integers(20, 500)), float(rng.integers(1, 8))
        pace.observe(0.1 + work * (0.004 + 0.001 * batch), work=work, prompt_tokens=50.0, batch=batch)
    profile = pace.profile(8)
    for batch in (1.0, 7.0):
        learnt_s = profile.call_base_s + 50.0 * profile.prefill_token_s
        learnt_s += 200.0 * (profile.step_base_s + profile.decode_seq_s * batch)
        assert learnt_s == pytest.approx(0.1 + 200.0 * (0.004 + 0.001 * batch), rel=0.1)
    assert profile.max_batch == 8


def test_one_call_is_enough_to_see_that_the_first_guess_was_far_off() -> None:
    pace = Pace(FIRST)
    pace.observe(1.0, work=1000.0, prompt_tokens=10.0, batch=1.0)
    assert pace.profile(1).step_base_s + pace.profile(1).decode_seq_s < 0.005


def test_a_replica_that_becomes_slower_is_seen_to_be_so() -> None:
    pace = Pace(FIRST)
    for step_s in [0.01] * 50 + [0.05] * 120:
        pace.observe(100.0 * step_s, work=100.0, prompt_tokens=10.0, batch=2.0)
    profile = pace.profile(4)
    assert 100.0 * (profile.step_base_s + 2.0 * profile.decode_seq_s) + profile.call_base_s == pytest.approx(
        5.0, rel=0.2
    )


@given(st.lists(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4), min_size=1, max_size=6))
def test_no_observation_makes_a_pace_negative_or_infinite(rows: list[tuple[float, float, float, float]]) -> None:
    pace = Pace(FIRST)
    for seconds, work, prompt_tokens, batch in rows:
        pace.observe(seconds, work=work, prompt_tokens=prompt_tokens, batch=batch)
    profile = pace.profile(2)
    for name in ("call_base_s", "prefill_token_s", "step_base_s", "decode_seq_s"):
        assert math.isfinite(getattr(profile, name))
        assert getattr(profile, name) >= 0.0


class _Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_replica_says_how_many_calls_it_has_and_how_fast_it_was() -> None:
    clock = _Clock()
    beside = Beside("app/m", "r0", clock=clock)
    assert beside.signal(1.0).profile is None
    first, second = beside.begin(10.0), beside.begin(10.0)
    assert beside.signal(1.0).running == 2
    clock.now_s = 2.0
    beside.end(first, 100.0)
    beside.end(second, None)  # it failed: nothing is learnt, but it is over
    signal = beside.signal(2.0)
    assert (signal.running, signal.calls) == (0, 1)
    assert signal.profile is not None
    took_s = signal.profile.call_base_s + 10.0 * signal.profile.prefill_token_s
    took_s += 100.0 * (signal.profile.step_base_s + 2.0 * signal.profile.decode_seq_s)
    assert took_s == pytest.approx(2.0, rel=0.1)


def _known(*, own_calls: int, told_calls: int) -> KnownReplica:
    replica = Replica(
        replica_id="r0",
        model="m",
        kind="llm",
        device="ray",
        url="",
        profile=FIRST,
        provider="ray",
        emulated=False,
    )
    known = KnownReplica(replica=replica, pace=Pace(FIRST))
    for work in range(own_calls):
        known.pace.observe(0.5 + 0.01 * (work + 1), work=work + 1.0, prompt_tokens=0.0, batch=1.0)
    known.told, known.told_calls = replace(FIRST, step_base_s=0.01, call_base_s=0.0), told_calls
    return known


def test_the_way_there_and_back_counts_where_the_calls_of_a_replica_come_from_here() -> None:
    assert _known(own_calls=60, told_calls=61).profile().call_base_s == pytest.approx(0.5, rel=0.1)
    assert _known(own_calls=20, told_calls=61).profile().call_base_s == 0.0


def test_what_one_constant_loses_to_another_is_no_news_and_a_slower_replica_is() -> None:
    shifted = replace(FIRST, step_base_s=0.019, decode_seq_s=0.001)
    slower = replace(FIRST, step_base_s=0.022)
    assert not differs(replace(FIRST, max_batch=1), replace(shifted, max_batch=1))
    assert differs(FIRST, slower)
    assert differs(FIRST, replace(FIRST, max_batch=FIRST.max_batch + 1))


def test_a_word_counts_as_of_when_it_was_said_however_far_the_clocks_are_apart() -> None:
    known = _known(own_calls=0, told_calls=0)
    assert known.said(5.0, 1005.002) == 1005.002  # the first: nobody knows better
    assert known.said(6.0, 1006.0) == 1006.0  # faster than any before
    assert known.said(7.0, 1007.5) == pytest.approx(1007.0, abs=1e-3)

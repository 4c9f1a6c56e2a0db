"""Continuous batching keeps its promises for every load, and agrees with arithmetic where arithmetic is easy."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.batching import Engine, Event, Request
from swarmx.core.engine import EngineProfile
from swarmx.core.engine_order import OrderName
from tests.core.slow_engine import SlowEngine

H100_8B = EngineProfile(
    model="8b",
    device="h100",
    step_base_s=6e-3,
    decode_seq_s=1e-4,
    decode_ctx_token_s=3e-8,
    prefill_token_s=4e-5,
    prefill_ctx_token_s=1e-9,
)
IMAGES = EngineProfile(model="sdxl", device="l40s", step_base_s=0.05, call_base_s=0.4, max_batch=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    request: Request
    at_s: float
    abort_after_s: float | None


def request(name: str, prompt: int, output: int, prefix: tuple[int, ...] = ()) -> Request:
    return Request(request_id=name, prompt_tokens=prompt, output_tokens=output, prefix=prefix)


@st.composite
def profiles(draw: st.DrawFn) -> EngineProfile:
    return EngineProfile(
        model="m",
        device="d",
        step_base_s=draw(st.sampled_from([1e-3, 7e-3])),
        decode_seq_s=draw(st.sampled_from([0.0, 2e-4])),
        decode_ctx_token_s=draw(st.sampled_from([0.0, 1e-6])),
        prefill_token_s=draw(st.sampled_from([0.0, 1e-4])),
        prefill_ctx_token_s=draw(st.sampled_from([0.0, 1e-7])),
        call_base_s=draw(st.sampled_from([0.0, 0.013])),
        kv_capacity_tokens=draw(st.sampled_from([160, 320, 4096])),
        max_batch=draw(st.sampled_from([1, 2, 5, 64])),
        max_step_tokens=draw(st.sampled_from([8, 64, 8192])),
    )


@st.composite
def loads(draw: st.DrawFn) -> list[Arrival]:
    arrivals = []
    at_s = 0.0
    for i in range(draw(st.integers(1, 14))):
        at_s += draw(st.sampled_from([0.0, 0.001, 0.0137, 0.2]))
        family = draw(st.integers(0, 2))
        arrivals.append(
            Arrival(
                request=request(
                    f"r{i}",
                    draw(st.integers(0, 90)),
                    draw(st.integers(1, 60)),
                    tuple(range(1000 * family, 1000 * family + draw(st.integers(0, 5)))),
                ),
                at_s=at_s,
                abort_after_s=draw(st.none() | st.sampled_from([0.0, 0.004, 0.1])),
            )
        )
    return arrivals


def play(engine: Engine, load: list[Arrival], slice_s: float | None = None) -> tuple[list[Event], set[str], int]:
    """Run the load to its end: the events, who was refused, and the tokens of aborted requests."""
    changes = [(a.at_s, 0, i) for i, a in enumerate(load)]
    changes += [(a.at_s + a.abort_after_s, 1, i) for i, a in enumerate(load) if a.abort_after_s is not None]
    events: list[Event] = []
    refused: set[str] = set()
    lost = 0
    now_s = 0.0
    for at_s, is_abort, i in sorted(changes):
        while slice_s is not None and now_s + slice_s < at_s:
            now_s += slice_s
            events += engine.advance(now_s)
        now_s = at_s
        if slice_s is not None:
            events += engine.advance(now_s)
        name = load[i].request.request_id
        if not is_abort:
            if not engine.submit(load[i].request, at_s):
                refused.add(name)
            continue
        events += engine.advance(at_s)
        over = name in refused or any(e.kind == "finished" and e.request_id == name for e in events)
        lost += 0 if over else engine.produced(name)
        assert engine.abort(name, at_s) is not over
    events += engine.advance(math.inf)
    return events, refused, lost


# not multiples of each other nor of any step: whether an arrival is before or after the end of a step never hangs on
# the last bit of a sum
GAPS_S = st.sampled_from([0.0, 0.00113, 0.0137171, 0.2171717])
SLICES_S = st.sampled_from([None, 0.00070311, 0.0110331, 0.30931])
ORDERS: st.SearchStrategy[OrderName] = st.sampled_from(["arrival", "priority", "uniboost"])


@st.composite
def conversations(draw: st.DrawFn) -> list[Arrival]:
    """Turns of a few agents: some prompts begin with the whole turn before, answer included, some with a part of it."""
    arrivals: list[Arrival] = []
    at_s = 0.0000171
    for i in range(draw(st.integers(1, 16))):
        at_s += draw(GAPS_S)
        prompt, output = draw(st.integers(0, 90)), draw(st.integers(1, 60))
        if draw(st.booleans()) and arrivals:
            last = draw(st.sampled_from(arrivals)).request
            prompt = min(150, last.prompt_tokens + last.output_tokens + draw(st.integers(-40, 40)))
            common = last.prefix[: draw(st.integers(0, 12))]
        else:
            common = ()
        own = draw(st.integers(0, 8))
        prefix = common + tuple(1000 * (i + 1) + j for j in range(own))
        arrivals.append(
            Arrival(
                request=Request(
                    request_id=f"r{i}",
                    prompt_tokens=max(0, prompt),
                    output_tokens=output,
                    prefix=prefix[: (max(0, prompt) + output) // 16],
                    priority=draw(st.sampled_from([0.0, 1.0, -2.5])),
                ),
                at_s=at_s,
                abort_after_s=draw(st.none() | st.none() | st.sampled_from([0.0, 0.00417, 0.10101])),
            )
        )
    return arrivals


@given(
    profile=profiles(),
    load=conversations(),
    slice_s=SLICES_S,
    order=ORDERS,
    gamma_per_token=st.sampled_from([1e-3, 0.05, 2.0]),
    asks=st.booleans(),
    clears=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_the_engine_equals_one_that_looks_at_every_sequence_in_every_step(
    profile: EngineProfile,
    load: list[Arrival],
    slice_s: float | None,
    order: OrderName,
    gamma_per_token: float,
    asks: bool,
    clears: bool,
) -> None:
    fast = Engine(profile, block_tokens=16, order=order, gamma_per_token=gamma_per_token)
    slow = SlowEngine(profile, block_tokens=16, order=order, gamma_per_token=gamma_per_token)

    def same(until_s: float) -> None:
        ours, theirs = fast.advance(until_s), slow.advance(until_s)
        assert [(e.kind, e.request_id) for e in ours] == [(e.kind, e.request_id) for e in theirs]
        assert [e.at_s for e in ours] == pytest.approx([e.at_s for e in theirs], rel=1e-9)
        assert fast.counters() == slow.counters()
        assert {name: fast.produced(name) for name in slow.sequences} == {
            name: sequence.produced for name, sequence in slow.sequences.items()
        }
        assert fast._pool.evictable() == slow.pool.cached

    changes = [(a.at_s, 0, i) for i, a in enumerate(load)]
    changes += [(a.at_s + a.abort_after_s, 1, i) for i, a in enumerate(load) if a.abort_after_s is not None]
    now_s = 0.0
    for at_s, is_abort, i in sorted(changes):
        while slice_s is not None and now_s + slice_s < at_s:
            now_s += slice_s
            same(now_s)
        now_s = at_s
        request = load[i].request
        if is_abort:
            assert fast.abort(request.request_id, at_s) == slow.abort(request.request_id, at_s)
        else:
            assert fast.submit(request, at_s) == slow.submit(request, at_s)
        if clears:
            fast.clear_cache()
            slow.clear_cache()
        if asks:
            fast.next_event_s()
            slow.start()
    while slice_s is not None and slow.sequences:
        now_s += 20 * slice_s
        same(now_s)
    same(math.inf)


def finishes(events: list[Event]) -> dict[str, float]:
    return {e.request_id: e.at_s for e in events if e.kind == "finished"}


@given(profile=profiles(), load=loads())
@settings(deadline=None, max_examples=300)
def test_every_request_ends_exactly_once_and_no_token_is_lost(profile: EngineProfile, load: list[Arrival]) -> None:
    engine = Engine(profile, block_tokens=16)
    events, refused, lost = play(engine, load)
    ended = Counter(e.request_id for e in events if e.kind == "finished")
    firsts = Counter(e.request_id for e in events if e.kind == "first_token")
    assert set(ended.values()) <= {1}
    assert set(firsts.values()) <= {1}
    never_aborted = {a.request.request_id for a in load if a.abort_after_s is None} - refused
    assert never_aborted <= set(ended)
    assert set(ended) <= set(firsts)
    tokens = {a.request.request_id: a.request.output_tokens for a in load}
    counters = engine.counters()
    assert counters.generated_tokens == sum(tokens[name] for name in ended) + lost
    assert (counters.running, counters.waiting, counters.kv_usage) == (0, 0, 0.0)
    assert counters.prefix_hit_tokens <= counters.prefix_query_tokens
    assert [e.at_s for e in events] == sorted(e.at_s for e in events)


@given(profile=profiles(), load=loads())
@settings(deadline=None, max_examples=200)
def test_capacity_and_batch_are_never_exceeded(profile: EngineProfile, load: list[Arrival]) -> None:
    engine = Engine(profile, block_tokens=16)
    for arrival in load:
        engine.submit(arrival.request, arrival.at_s)
    for _ in range(5000):
        at_s = engine.next_event_s()
        counters = engine.counters()
        assert counters.running <= profile.max_batch
        assert counters.kv_usage <= 1.0
        assert engine._pool.idle + engine._pool.used <= engine._pool.capacity
        if at_s is None:
            return
        engine.advance(at_s)
    pytest.fail("the engine does not come to rest")


@given(profile=profiles(), load=loads())
@settings(deadline=None, max_examples=200)
def test_admission_is_first_come_first_served(profile: EngineProfile, load: list[Arrival]) -> None:
    events, refused, _ = play(Engine(profile, block_tokens=16), load)
    admitted = [e.request_id for e in events if e.kind == "admitted"]
    arrived = [a.request.request_id for a in load if a.request.request_id in set(admitted)]
    assert admitted == arrived
    assert not refused & set(admitted)


@given(profile=profiles(), load=loads(), slice_s=st.sampled_from([0.0007, 0.011, 0.3]))
@settings(deadline=None, max_examples=200)
def test_any_slicing_of_time_gives_the_same_finishing_times(
    profile: EngineProfile, load: list[Arrival], slice_s: float
) -> None:
    whole, _, _ = play(Engine(profile, block_tokens=16), load)
    sliced, _, _ = play(Engine(profile, block_tokens=16), load, slice_s)
    assert sliced == whole


@given(prompt=st.integers(1, 8192), output=st.integers(1, 2000))
@settings(deadline=None)
def test_a_single_request_takes_what_the_profile_says(prompt: int, output: int) -> None:
    engine = Engine(H100_8B)
    engine.submit(request("a", prompt, output), 5.0)
    took_s = finishes(engine.advance(math.inf))["a"] - 5.0
    assert took_s == pytest.approx(H100_8B.alone_s(prompt, output), rel=1e-3)


def test_a_batch_of_two_in_closed_form() -> None:
    engine = Engine(H100_8B)
    engine.submit(request("a", 100, 11), 0.0)
    engine.submit(request("b", 100, 11), 0.0)
    events = engine.advance(math.inf)
    prefill_s = H100_8B.step_s(0, 0, 200, 2 * (99 * 100 / 2))
    decode_s = sum(H100_8B.step_s(2, 2 * (100 + k)) for k in range(1, 11))
    firsts = [e.at_s for e in events if e.kind == "first_token"]
    assert firsts == pytest.approx([prefill_s, prefill_s])
    assert finishes(events) == pytest.approx({"a": prefill_s + decode_s, "b": prefill_s + decode_s})


def test_the_step_in_progress_finishes_before_a_newcomer_joins() -> None:
    engine = Engine(H100_8B)
    engine.submit(request("a", 10, 1000), 0.0)
    engine.advance(0.0101)
    assert engine.produced("a") == 1
    engine.submit(request("b", 10, 1), 0.0101)
    first_s = H100_8B.step_s(0, 0, 10, 45)
    second_s = first_s + H100_8B.step_s(1, 11)
    assert first_s < 0.0101 < second_s
    events = engine.advance(1.0)
    assert [e.at_s for e in events if e.kind == "admitted"] == pytest.approx([second_s])
    assert finishes(events)["b"] == pytest.approx(second_s + H100_8B.step_s(1, 12, 10, 45))


def test_a_long_prompt_is_prefilled_in_chunks_beside_the_decodes() -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=1.0, prefill_token_s=0.01, max_step_tokens=101)
    engine = Engine(profile)
    engine.submit(request("a", 1, 50), 0.0)
    engine.advance(1.01)
    engine.submit(request("b", 250, 1), 1.01)
    took_s = finishes(engine.advance(100.0))["b"] - 1.01
    assert took_s == pytest.approx(3 * 1.0 + 250 * 0.01)  # chunks of 100, 100 and 50 tokens


def test_a_cached_prefix_is_not_computed_again_but_its_last_block_is() -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=1.0, prefill_token_s=1.0)
    engine = Engine(profile, block_tokens=16)
    engine.submit(request("a", 64, 1, (1, 2, 3, 4)), 0.0)
    engine.advance(100.0)
    engine.submit(request("b", 64, 1, (1, 2, 3, 4)), 100.0)
    assert finishes(engine.advance(200.0)) == {"b": 100.0 + 1.0 + 16.0}
    engine.submit(request("c", 64, 1, (1, 2, 30, 40)), 200.0)
    assert finishes(engine.advance(300.0)) == {"c": 200.0 + 1.0 + 32.0}
    assert engine.counters().prefix_hit_tokens == 48 + 32
    engine.clear_cache()
    engine.submit(request("d", 64, 1, (1, 2, 3, 4)), 300.0)
    assert finishes(engine.advance(400.0)) == {"d": 300.0 + 1.0 + 64.0}


def test_the_next_turn_finds_the_answer_of_the_last_one_in_the_cache() -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=1.0, prefill_token_s=1.0)
    engine = Engine(profile, block_tokens=16)
    engine.submit(request("a", 40, 60, (1, 2, 3, 4, 5, 6)), 0.0)
    assert finishes(engine.advance(1000.0)) == {"a": 1.0 + 40.0 + 59.0}
    engine.submit(request("b", 120, 1, (1, 2, 3, 4, 5, 6, 7)), 1000.0)
    assert finishes(engine.advance(2000.0)) == {"b": 1000.0 + 1.0 + 24.0}  # 99 tokens are in the cache: six blocks
    assert engine.counters().prefix_hit_tokens == 96


def test_what_an_aborted_request_has_computed_stays_cached() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, prefill_token_s=1.0), block_tokens=16)
    engine.submit(request("a", 40, 1000, tuple(range(60))), 0.0)
    engine.advance(41.0 + 30.0)
    assert engine.abort("a", 71.0)
    engine.submit(request("b", 200, 1, tuple(range(12))), 100.0)
    engine.advance(1000.0)
    assert engine.counters().prefix_hit_tokens == 64  # 40 tokens of prompt and 30 of the answer


def test_siblings_of_one_iteration_share_their_prefix() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, prefill_token_s=1.0), block_tokens=16)
    engine.submit(request("a", 40, 1, (1, 2)), 0.0)
    engine.submit(request("b", 40, 1, (1, 2)), 0.0)
    assert set(finishes(engine.advance(100.0)).values()) == {1.0 + 40.0 + 8.0}


def test_the_youngest_is_preempted_and_computed_again() -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=1.0, kv_capacity_tokens=96)
    engine = Engine(profile, block_tokens=16)
    engine.submit(request("a", 30, 40), 0.0)
    engine.submit(request("b", 30, 40), 0.0)
    events = engine.advance(1000.0)
    assert {e.request_id for e in events if e.kind == "preempted"} == {"b"}
    assert finishes(events)["a"] == 40.0
    assert finishes(events)["b"] == 61.0  # 19 tokens by 19 s, the other 21 once a is done
    assert engine.counters().generated_tokens == 80


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, kv_capacity_tokens=128))
    assert not engine.submit(request("a", 120, 10), 0.0)
    assert engine.submit(request("b", 120, 9), 0.0)
    assert set(finishes(engine.advance(100.0))) == {"b"}


def test_an_abort_frees_the_slot_for_the_next() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, max_batch=1))
    engine.submit(request("a", 0, 100), 0.0)
    engine.submit(request("b", 0, 2), 0.0)
    assert engine.abort("a", 10.5)
    assert not engine.abort("a", 10.5)
    assert finishes(engine.advance(100.0)) == {"b": 13.0}  # the step in progress ends at 11


def test_an_abort_in_the_queue_lets_the_next_one_in() -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=1.0, kv_capacity_tokens=96)
    engine = Engine(profile, block_tokens=16)
    engine.submit(request("a", 16, 60), 0.0)
    engine.submit(request("too big for now", 90, 1), 0.0)
    engine.submit(request("small", 10, 1), 0.0)
    engine.advance(5.5)
    assert engine.abort("too big for now", 5.5)
    assert finishes(engine.advance(1000.0))["small"] == 7.0


def test_a_serial_server_pays_its_base_and_its_units_one_call_after_the_other() -> None:
    engine = Engine(IMAGES)
    engine.submit(request("a", 0, 30), 0.0)
    engine.submit(request("b", 0, 10), 0.1)
    assert finishes(engine.advance(100.0)) == pytest.approx({"a": 1.9, "b": 1.9 + 0.9})


def test_a_batching_server_spends_the_call_base_beside_its_iterations() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, call_base_s=2.5))
    engine.submit(request("a", 0, 10), 0.0)
    assert engine.next_event_s() == 2.5
    engine.submit(request("b", 0, 3), 1.0)
    assert finishes(engine.advance(100.0)) == {"a": 12.5, "b": 6.5}  # b is ready at 3.5 and joins at once


def test_the_next_event_is_where_advance_finds_one() -> None:
    engine = Engine(H100_8B)
    assert engine.next_event_s() is None
    engine.submit(request("a", 500, 300), 1.0)
    at_s = engine.next_event_s()
    assert at_s is not None
    assert [e.kind for e in engine.advance(at_s)] == ["admitted", "first_token"]
    at_s = engine.next_event_s()
    assert at_s is not None
    assert not engine.advance(at_s - 1e-6)
    assert [e.kind for e in engine.advance(at_s)] == ["finished"]
    assert engine.next_event_s() is None


def test_an_id_is_used_once_at_a_time() -> None:
    engine = Engine(H100_8B)
    engine.submit(request("a", 5, 5), 0.0)
    with pytest.raises(ValueError, match="already in the engine"):
        engine.submit(request("a", 5, 5), 0.0)


@pytest.mark.parametrize(("prompt", "output"), [(-1, 1), (1, 0)])
def test_a_request_without_work_is_an_error(prompt: int, output: int) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        request("a", prompt, output)


def test_a_scaled_profile_is_faster_in_every_second() -> None:
    fast = IMAGES.scaled(10.0)
    assert (fast.step_base_s, fast.call_base_s, fast.max_batch) == (0.005, 0.04, 1)
    assert H100_8B.scaled(4.0).alone_s(700, 90) == pytest.approx(H100_8B.alone_s(700, 90) / 4.0)
    with pytest.raises(ValueError, match="above zero"):
        IMAGES.scaled(0.0)

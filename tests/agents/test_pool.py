from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.pool import Pool
from swarmx.core.fleet import COLUMNS, Choice
from swarmx.core.forecast import point
from swarmx.core.nouns import ReplicaState
from tests.agents.worlds import FAST, a_call, a_profile, a_replica

NOBODY: frozenset[str] = frozenset()


def a_pool(*replica_ids: str, state: ReplicaState = "ready") -> Pool:
    pool = Pool("m")
    for replica_id in replica_ids:
        pool.set_state(a_replica(replica_id), state, 0.0)
    return pool


def ids(pool: Pool, excluded: frozenset[str] = NOBODY) -> list[str]:
    return [pool.replicas[column].replica_id for column in pool.eligible(excluded)]


def test_only_ready_replicas_are_eligible() -> None:
    pool = a_pool("a", "b", "c")
    pool.set_state(a_replica("b"), "draining", 0.0)
    assert ids(pool) == ["a", "c"]


def test_a_broken_replica_is_not_eligible_until_it_is_mended() -> None:
    pool = a_pool("a", "b")
    pool.set_broken("a", True)
    assert ids(pool) == ["b"]
    pool.set_broken("a", False)
    assert ids(pool) == ["a", "b"]


def test_excluded_replicas_are_eligible_only_when_nobody_else_is() -> None:
    pool = a_pool("a", "b")
    assert ids(pool, frozenset({"a"})) == ["b"]
    assert ids(pool, frozenset({"a", "b", "unknown"})) == ["a", "b"]


def open_ids(pool: Pool, excluded: frozenset[str] = NOBODY) -> list[str]:
    return [pool.replicas[column].replica_id for column in pool.open(excluded)]


def fill(pool: Pool, replica_id: str) -> None:
    for _ in range(FAST.max_batch):
        pool.dispatched(replica_id, a_call("c"), point(10.0, unit="tokens"), 1, 0.0, 0.0)


def test_a_replica_is_open_until_its_batch_is_full_and_again_when_a_call_ends() -> None:
    pool = a_pool("a", "b")
    fill(pool, "a")
    assert (open_ids(pool), ids(pool)) == (["b"], ["a", "b"])
    pool.ended("a", 10.0, 0.0, 100.0, 1.0)
    assert open_ids(pool) == ["a", "b"]


def test_a_full_replica_that_was_not_tried_keeps_the_tried_ones_closed() -> None:
    pool = a_pool("a", "b")
    fill(pool, "b")
    assert open_ids(pool, frozenset({"a"})) == []
    assert open_ids(pool, frozenset({"a", "b"})) == ["a"]


def test_what_is_open_follows_the_states_breakers_and_profiles() -> None:
    pool = a_pool("a", "b", "c")
    assert open_ids(pool) == ["a", "b", "c"]
    pool.set_broken("a", True)
    assert open_ids(pool) == ["b", "c"]
    pool.set_state(a_replica("b"), "gone", 0.0)
    assert open_ids(pool) == ["c"]
    pool.dispatched("c", a_call("c"), point(10.0, unit="tokens"), 1, 0.0, 0.0)
    pool.set_state(a_replica("c", profile=a_profile(max_batch=1)), "ready", 0.0)
    assert open_ids(pool) == []


def test_without_late_binding_a_full_replica_is_open() -> None:
    pool = Pool("m", late_binding=False)
    pool.set_state(a_replica("a"), "ready", 0.0)
    fill(pool, "a")
    assert open_ids(pool) == ["a"]


def test_a_pool_grows_and_shrinks_without_mixing_up_its_replicas() -> None:
    pool = a_pool(*(f"r{i}" for i in range(40)))
    for i in range(40):
        for _ in range(i):
            pool.dispatched(f"r{i}", a_call("c"), point(10.0, unit="tokens"), i, 1.0, 0.0)
    for i in range(0, 40, 2):
        pool.set_state(a_replica(f"r{i}"), "gone", 2.0)
    for i in range(40, 60):
        pool.set_state(a_replica(f"r{i}"), "ready", 3.0)
    assert [pool.in_flight(f"r{i}") for i in range(1, 40, 2)] == list(range(1, 40, 2))
    assert [pool.in_flight(f"r{i}") for i in range(40, 60)] == [0] * 20
    assert len(pool) == len(ids(pool)) == 40


def test_a_pool_that_lost_all_its_replicas_takes_new_ones() -> None:
    pool = a_pool("a")
    pool.set_state(a_replica("a"), "gone", 0.0)
    assert ids(pool) == []
    pool.set_state(a_replica("b"), "ready", 0.0)
    assert ids(pool) == ["b"]


def test_an_idle_replica_is_idle_exactly() -> None:
    pool = a_pool("a")
    for work in (0.1, 0.2, 0.3):
        pool.dispatched("a", a_call("c"), point(work, unit="tokens"), 1, 0.0, 0.0)
    for work in (0.3, 0.1, 0.2):
        pool.ended("a", work, 0.0, 100.0, 1.0)
    view = pool.view(pool.eligible(NOBODY), 1.0)
    assert (view.in_flight[0], view.remaining_work[0], view.context_tokens[0], view.prefill_tokens[0]) == (0, 0, 0, 0)


@given(
    weights=st.lists(st.tuples(st.sampled_from("ab"), st.floats(1e-4, 1e4)), max_size=30),
    ends=st.lists(st.integers(0, 29), max_size=40),
)
def test_a_replica_weighs_what_its_calls_weigh_and_an_idle_one_nothing(
    weights: list[tuple[str, float]], ends: list[int]
) -> None:
    pool, there = a_pool("a", "b"), dict[str, list[float]](a=[], b=[])

    def check() -> None:
        view = pool.view(pool.eligible(NOBODY), 1.0)
        assert view.in_flight.tolist() == [len(calls) for calls in there.values()]
        np.testing.assert_allclose(view.weight, [sum(calls) for calls in there.values()], rtol=1e-9, atol=1e-9)
        assert (view.weight[view.in_flight == 0] == 0.0).all()

    def end(replica_id: str, position: int) -> None:
        weight = there[replica_id].pop(position)
        pool.ended(replica_id, 10.0, 0.0, 100.0, 1.0, weight=weight)
        check()

    coming = iter(ends)
    for replica_id, weight in weights:
        pool.dispatched(replica_id, a_call("c"), point(10.0, unit="tokens"), 1, 0.0, 0.0, weight)
        there[replica_id].append(weight)
        check()
        if (position := next(coming, 29)) < len(there[replica_id]):
            end(replica_id, position)
    for replica_id, calls in there.items():
        while calls:
            end(replica_id, next(coming, 0) % len(calls))


def test_a_replica_that_comes_back_with_another_profile_weighs_the_same() -> None:
    pool = a_pool("a")
    pool.dispatched("a", a_call("c"), point(10.0, unit="tokens"), 1, 0.0, 0.0, 7.0)
    pool.set_state(a_replica("a", profile=a_profile(max_batch=3)), "ready", 1.0)
    assert pool.view(pool.eligible(NOBODY), 1.0).weight.tolist() == [7.0]


def test_prompts_drain_at_the_prefill_rate() -> None:
    pool = Pool("m")
    pool.set_state(a_replica("a", profile=a_profile(prefill_token_s=0.01)), "ready", 0.0)
    pool.dispatched("a", a_call("c", prompt_tokens=100), point(10.0, unit="tokens"), 1, 5.0, 0.0)
    left = [float(pool.view(pool.eligible(NOBODY), now_s).prefill_tokens[0]) for now_s in (5.0, 5.5, 6.0, 7.0)]
    assert left == pytest.approx([100.0, 50.0, 0.0, 0.0])


def test_a_second_prompt_joins_what_is_left_of_the_first() -> None:
    pool = Pool("m")
    pool.set_state(a_replica("a", profile=a_profile(prefill_token_s=0.01)), "ready", 0.0)
    pool.dispatched("a", a_call("c", prompt_tokens=100), point(10.0, unit="tokens"), 1, 0.0, 0.0)
    pool.dispatched("a", a_call("d", prompt_tokens=100), point(10.0, unit="tokens"), 2, 0.5, 0.0)
    assert float(pool.view(pool.eligible(NOBODY), 0.5).prefill_tokens[0]) == pytest.approx(150.0)


def test_a_server_without_prefill_has_no_backlog_of_prompts() -> None:
    pool = Pool("m")
    pool.set_state(a_replica("a", profile=a_profile(prefill_token_s=0.0)), "ready", 0.0)
    pool.dispatched("a", a_call("c"), point(10.0, unit="tokens"), 1, 0.0, 0.0)
    assert float(pool.view(pool.eligible(NOBODY), 0.0).prefill_tokens[0]) == 0.0


def test_counters_that_were_never_reported_are_unknown_and_not_zero() -> None:
    pool = a_pool("a", "b")
    pool.set_signal("a", 3, 1, 0.5, 10.0)
    view = pool.view(pool.eligible(NOBODY), 12.0)
    assert (view.running[0], view.waiting[0], view.kv_usage[0], view.signal_age_s[0]) == (3.0, 1.0, 0.5, 2.0)
    unknown = [view.running[1], view.waiting[1], view.kv_usage[1], view.signal_age_s[1]]
    assert all(math.isnan(value) for value in unknown)


def test_a_report_older_than_the_last_is_ignored() -> None:
    pool = a_pool("a")
    pool.set_signal("a", 3, 0, 0.5, 10.0)
    pool.set_signal("a", 9, 9, 0.9, 9.0)
    assert float(pool.view(pool.eligible(NOBODY), 12.0).running[0]) == 3.0


def test_a_policy_that_writes_into_its_view_does_not_change_the_memory() -> None:
    pool = a_pool("a")
    pool.view(pool.eligible(NOBODY), 0.0).in_flight[0] = 99
    assert pool.in_flight("a") == 0


def test_a_policy_that_writes_over_a_profile_does_not_change_what_the_next_one_sees() -> None:
    pool = a_pool("a")
    pool.view(pool.eligible(NOBODY), 0.0).step_base_s[0] = 99.0
    assert pool.view(pool.eligible(NOBODY), 0.0).step_base_s.tolist() == [a_profile().step_base_s]


def test_a_view_stays_as_it_was_whatever_comes_later() -> None:
    pool = a_pool("a", "b")
    view = pool.view(pool.eligible(NOBODY), 1.0)
    before = {name: getattr(view, name).copy() for name in COLUMNS}
    pool.dispatched("a", a_call("c"), point(10.0, unit="tokens"), 1, 1.0, 0.0)
    pool.took("b", 2.0)
    pool.set_signal("b", 3, 1, 0.5, 1.0)
    pool.set_state(a_replica("a", profile=a_profile(max_batch=3)), "ready", 1.0)
    pool.view(pool.eligible(NOBODY), 2.0)
    for name, column in before.items():
        np.testing.assert_array_equal(getattr(view, name), column)


def test_a_replica_that_comes_back_with_another_profile_is_seen_with_it() -> None:
    pool = a_pool("a")
    pool.dispatched("a", a_call("c"), point(10.0, unit="tokens"), 1, 0.0, 0.0)
    pool.set_state(a_replica("a", profile=a_profile(max_batch=3)), "ready", 1.0)
    view = pool.view(pool.eligible(NOBODY), 1.0)
    assert (view.max_batch[0], view.in_flight[0]) == (3, 1)


@pytest.mark.parametrize("cost_s", [np.zeros(100), np.arange(100.0), np.arange(100.0)[::-1], np.full(100, np.inf)])
def test_the_log_of_a_large_fleet_keeps_the_chosen_one_and_its_runner_up(cost_s: np.ndarray) -> None:
    pool = a_pool(*(f"r{i}" for i in range(100)))
    columns = pool.eligible(NOBODY)
    choice = Choice(index=50, cost_s=cost_s, terms_s={"wait_s": cost_s})
    kept = pool.roster.candidates(columns, pool.view(columns, 0.0), choice, 60)
    assert kept.total == 100
    assert len(kept.replica_ids) == len(set(kept.replica_ids)) == 32
    assert {"r50", "r60"} <= set(kept.replica_ids)


def test_what_is_not_finite_is_kept_as_unknown() -> None:
    pool = a_pool("a", "b", "c")
    columns = pool.eligible(NOBODY)
    choice = Choice(index=0, cost_s=np.array([1.0, np.inf, np.nan]))
    assert pool.roster.candidates(columns, pool.view(columns, 0.0), choice, None).cost_s == (1.0, None, None)


def test_calls_of_other_routers_are_what_an_engine_had_beyond_our_own_of_that_time() -> None:
    pool = Pool("m", shared=True)
    pool.set_state(a_replica("a"), "ready", 0.0)
    for i in range(4):
        pool.dispatched("a", a_call(f"c{i}"), point(10.0, unit="tokens"), i, float(i), 0.0)
    assert pool.set_signal("a", 5, 1, 0.5, 1.5)  # two of our calls were there at that time
    assert pool.view(pool.eligible(frozenset()), 5.0).in_flight.tolist() == [8]
    assert len(pool.open(frozenset())) == 0
    pool.ended("a", 10.0, 0.0, 100.0, 6.0)
    assert pool.set_signal("a", 3, 0, 0.5, 7.0)
    assert not pool.set_signal("a", 2, 1, 0.5, 8.0)  # no news of others
    assert pool.view(pool.eligible(frozenset()), 7.0).in_flight.tolist() == [3]
    assert pool.view(pool.eligible(frozenset()), 7.0).weight.tolist() == [3.0]
    assert len(pool.open(frozenset())) == 1


def test_what_was_told_of_other_routers_fades_towards_what_is_usual() -> None:
    pool = Pool("m", shared=True)
    pool.set_state(a_replica("a"), "ready", 0.0)
    pool.dispatched("a", a_call("c"), point(10.0, unit="tokens"), 0, 0.0, 0.0)
    pool.ended("a", 10.0, 0.0, 100.0, 0.0)
    for second in range(1, 101):
        pool.set_signal("a", 2, 0, 0.5, float(second))
    pool.set_signal("a", 40, 0, 0.5, 100.1)
    columns = pool.eligible(NOBODY)
    assert pool.view(columns, 100.1).in_flight.tolist() == [40]
    soon, late = (int(pool.view(columns, 100.1 + age_s).in_flight[0]) for age_s in (0.05, 3600.0))
    assert 3 < soon < 40
    assert late in (2, 3)  # the one signal of 40 counts little in what is usual


def test_routers_that_heard_the_same_see_other_whole_numbers() -> None:
    seen = set[int]()
    for seed in range(20):
        pool = Pool("m", shared=True, seed=seed)
        pool.set_state(a_replica("a"), "ready", 0.0)
        pool.dispatched("a", a_call("c"), point(10.0, unit="tokens"), 0, 0.0, 0.0)
        pool.set_signal("a", 3, 0, 0.5, 1.0)
        pool.set_signal("a", 2, 0, 0.5, 11.0)
        seen.add(int(pool.view(pool.eligible(NOBODY), 3600.0).in_flight[0]))
    assert seen == {2, 3}  # own and between one and two of others


def test_calls_of_other_routers_weigh_what_our_own_usually_do() -> None:
    pool = Pool("m", shared=True)
    pool.set_state(a_replica("a"), "ready", 0.0)
    for i in range(500):
        pool.dispatched("a", a_call(f"c{i}"), point(10.0, unit="tokens"), i, 0.0, 0.0, 20.0)
        pool.ended("a", 10.0, 0.0, 100.0, 0.0, weight=20.0)
    pool.set_signal("a", 3, 0, 0.5, 1.0)
    assert pool.view(pool.eligible(NOBODY), 1.0).weight.tolist() == pytest.approx([60.0], rel=1e-3)


def drawn(seed: int, count: int) -> list[float]:
    """The first numbers of SplitMix64 with this seed, as the paper has it, in [0, 1)."""
    mask, found = 2**64 - 1, list[float]()
    for number in range(1, count + 1):
        bits = (seed + number * 0x9E3779B97F4A7C15) & mask
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
        found.append((bits ^ bits >> 31) / 2**64)
    return found


def test_draws_are_even_and_differ_by_router() -> None:
    """Between two whole numbers of calls elsewhere, the upper one is counted as often as it should be."""
    counted = []
    for seed in range(200):
        pool = Pool("m", shared=True, seed=seed)
        pool.set_state(a_replica("a"), "ready", 0.0)
        pool.dispatched("a", a_call("c"), point(10.0, unit="tokens"), 1, 0.0, 0.0)
        pool.ended("a", 10.0, 0.0, 100.0, 0.0)
        pool.set_signal("a", 0, 0, 0.0, 1.0)
        pool.set_signal("a", 1, 0, 0.0, 1.0 + 20.0 * math.log(4.0 / 3.0))  # which makes a quarter of a call usual
        counted.append([int(pool.view(pool.eligible(NOBODY), 1e6).in_flight[0]) for _ in range(50)])
    assert np.mean(counted) == pytest.approx(0.25, abs=0.02)
    assert len({tuple(of_one) for of_one in counted}) > 190


def test_calls_of_other_routers_are_counted_in_as_the_formula_has_it() -> None:
    shared, alone = Pool("m", shared=True, seed=7), Pool("m")
    for number in range(6):
        profile = msgspec.structs.replace(
            FAST, max_batch=6, call_base_s=0.02 * number, decode_ctx_token_s=1e-5, prefill_token_s=1e-4
        )
        for pool in (shared, alone):
            pool.set_state(a_replica(f"r{number}", profile=profile), "ready", 0.0)
    for number in range(5):  # nothing is told of the last one
        for running, at_s in ((number, 1.0), (9 - number, 2.0 + 0.1 * number)):
            shared.set_signal(f"r{number}", running, 0, 0.0, at_s)
            alone.set_signal(f"r{number}", running, 0, 0.0, at_s)
    for number in range(2):
        for pool in (shared, alone):
            pool.dispatched(f"r{number}", a_call("c"), point(2000.0, unit="tokens"), 1, 2.4, 0.0, 3.0)
    columns = alone.eligible(NOBODY)
    own, seen = alone.view(columns, 2.7), shared.view(columns, 2.7)

    at_s = np.array([2.0 + 0.1 * number for number in range(5)])
    before, told = np.arange(5.0), 9.0 - np.arange(5.0)
    usual = np.append(before - np.expm1((1.0 - at_s) / 20.0) * (told - before), 0.0)
    told, prompt, work, weight = np.append(told, 0.0), float(a_call("c").prompt_tokens), 2000.0, 1.0 + 0.02 * 2.0
    weight += 0.02 * (3.0 - weight)
    batch = np.minimum(own.in_flight + told + 1.0, own.max_batch)
    step_s = own.step_base_s + own.decode_seq_s * batch + own.decode_ctx_token_s * (own.context_tokens + told * prompt)
    stay_s = own.call_base_s + own.prefill_token_s * prompt + work * step_s
    fresh = np.exp(-np.append(2.7 - at_s, 0.0) / (0.2 * stay_s))
    others = np.floor(usual + fresh * (told - usual) + drawn(7, 6))
    assert len(set(others)) > 3
    assert seen.in_flight.tolist() == (own.in_flight + others).tolist()
    assert seen.remaining_work.tolist() == pytest.approx((own.remaining_work + others * work / 2.0).tolist())
    assert seen.context_tokens.tolist() == pytest.approx((own.context_tokens + others * prompt).tolist())
    assert seen.weight.tolist() == pytest.approx((own.weight + others * weight).tolist())


@given(st.lists(st.tuples(st.sampled_from(["sent", "ended", "told"]), st.sampled_from("ab"), st.integers(0, 5))))
def test_what_is_open_is_known_at_any_time_though_other_routers_send_calls(
    steps: list[tuple[str, str, int]],
) -> None:
    pool, there, others = Pool("m", shared=True), {"a": 0, "b": 0}, {"a": 0, "b": 0}
    for replica_id in there:
        pool.set_state(a_replica(replica_id, profile=msgspec.structs.replace(FAST, max_batch=3)), "ready", 0.0)
    for at_s, (step, replica_id, running) in enumerate(steps, start=1):
        if step == "sent":
            there[replica_id] += 1
            pool.dispatched(replica_id, a_call("c"), point(10.0, unit="tokens"), 1, float(at_s), 0.0)
        elif step == "ended" and there[replica_id]:
            there[replica_id] -= 1
            pool.ended(replica_id, 10.0, 0.0, 0.0, float(at_s))
        elif step == "told":
            others[replica_id] = max(0, running - there[replica_id])
            pool.set_signal(replica_id, running, 0, 0.0, float(at_s))
        assert open_ids(pool) == [name for name in there if there[name] + others[name] < 3]

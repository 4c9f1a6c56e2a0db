"""Starts that the scaler waits for: how long they take, those that fail, and those that an earlier life began."""

from __future__ import annotations

from itertools import pairwise

from msgspec.structs import replace

from swarmx.core.actions import Drain
from swarmx.core.messages import AlertRaised, BoundsChanged, ScaleRequested
from tests.agents.scaling_worlds import a_bench, a_bench_with, a_group, deployed, drained, of_group
from tests.agents.worlds import a_profile


def test_a_replica_that_never_becomes_ready_is_given_up_and_its_group_waits() -> None:
    bench = a_bench(a_group(limit=1, start_s=10.0), start_patience=4.0, start_floor_s=5.0)
    assert deployed(bench.tick(8)) == ["g-0"]
    bench.become("starting", "g-0")
    said = [(bench.now_s, bench.tick(8)) for _ in range(21)]
    assert said[-1] == (
        42.0,
        [
            Drain(replica_id="g-0", deadline_at_s=44.0),
            AlertRaised(kind="replica_failed", subject="g-0", value=42.0),
        ],
    )
    assert not any(outputs for _, outputs in said[:-1])
    bench.become("gone", "g-0")
    assert bench.reason == "backoff"
    assert deployed(bench.tick(8)) == ["g-1"]


def test_a_replica_that_was_given_up_is_not_drained_again_at_once_when_it_comes_after_all() -> None:
    bench = a_bench(a_group(limit=1, start_s=10.0), start_patience=4.0, start_floor_s=5.0)
    bench.tick(8)
    bench.become("starting", "g-0")
    while not drained(bench.tick(8)):
        pass
    bench.become("ready", "g-0")
    assert not drained(bench.tick(8))


def test_the_wait_doubles_with_each_failure_in_a_row_up_to_its_most() -> None:
    bench = a_bench(a_group(limit=1), backoff_most_s=30.0)
    tries = []
    for _ in range(200):
        if started := deployed(bench.tick(8)):
            tries.append(bench.now_s)
            bench.become("starting", *started)
            bench.become("gone", *started)
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps[:6] == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_success_ends_the_wait() -> None:
    bench = a_bench(a_group(limit=1))
    for _ in range(3):
        bench.become("gone", *deployed(bench.tick(8, after_s=100.0)))
    bench.become("ready", *deployed(bench.tick(8, after_s=100.0)))
    bench.become("gone", "g-3")
    assert bench.agent._models["m"].supply.held["g-4"].state == "starting"
    bench.become("gone", "g-4")
    assert deployed(bench.tick(8)) == ["g-5"]


def test_another_group_stands_in_for_one_that_fails() -> None:
    bench = a_bench(a_group("a"), a_group("b", profile=a_profile(cost_weight=2.0)))
    assert deployed(bench.tick(8)) == ["a-0"]
    bench.become("gone", "a-0")
    assert deployed(bench.tick(8, after_s=1.0)) == ["b-0"]


def test_an_end_that_was_wished_is_no_failure() -> None:
    bench = a_bench()
    bench.tick(16)
    bench.say(ScaleRequested(model="m", replicas=1, hold_s=1.0))
    bench.become("draining", "g-1")
    bench.become("gone", "g-1")
    assert deployed(bench.tick(16)) == ["g-2"]


def test_a_start_that_nobody_began_does_not_take_up_room_for_ever() -> None:
    bench = a_bench(a_group(limit=1), start_floor_s=1.0, start_patience=0.1)
    assert deployed(bench.tick(8)) == ["g-0"]
    assert drained(bench.tick(8)) == ["g-0"]
    assert deployed(bench.tick(8)) == ["g-1"]


def test_a_sudden_loss_is_made_up_for_at_once() -> None:
    bench = a_bench_with(2, up_cooldown_s=100.0)
    assert deployed(bench.become("gone", "g-0")) == ["g-2"]


def test_one_that_an_earlier_life_started_is_ours_from_the_first_plan_on() -> None:
    bench = a_bench(a_group(min_replicas=1))
    adopted = replace(of_group("g-4", "starting", a_group()), group_id="g")
    assert bench.say(adopted) == []
    assert bench.tick() == []
    bench.become("ready", "g-4")
    assert bench.agent.startup_s("m") == 10.0  # that it answers at once is no start
    assert deployed(bench.tick(16)) == ["g-5"]
    bench.become("ready", "g-5")
    bench.say(BoundsChanged(model="m", min_replicas=0, max_replicas=0))
    assert set(drained(bench.outputs)) == {"g-4", "g-5"}


def test_one_that_was_adopted_and_never_answers_is_given_up() -> None:
    bench = a_bench(start_floor_s=30.0, start_patience=2.0)
    bench.say(replace(of_group("g-0", "starting", a_group()), group_id="g"))
    assert drained(bench.tick(0, after_s=1.0)) == []
    assert drained(bench.tick(8, after_s=40.0)) == ["g-0"]


def test_one_of_ours_that_comes_back_is_still_ours() -> None:
    bench = a_bench_with(1)
    bench.become("gone", "g-0")
    bench.become("ready", "g-0", "g-1")
    assert drained(bench.tick(0)) == ["g-0", "g-1"]


def test_a_replica_that_is_told_to_go_does_not_count_again_when_it_says_that_it_is_ready() -> None:
    bench = a_bench()
    bench.tick(16)
    bench.say(ScaleRequested(model="m", replicas=1, hold_s=100.0))
    bench.become("ready", "g-0", "g-1")
    assert bench.agent._models["m"].supply.count() == 1


def test_the_horizon_is_the_start_up_time_that_was_seen_and_one_interval() -> None:
    bench = a_bench(a_group(start_s=10.0))
    bench.tick(8)
    assert bench.agent.startup_s("m") == 10.0
    assert bench.agent.last_plan("m").horizon_s == 12.0  # type: ignore[union-attr]
    bench.become("starting", "g-0")
    bench.now_s += 30.0
    bench.become("ready", "g-0")
    assert bench.agent.startup_s("m") == 30.0
    bench.tick(8)
    assert bench.agent.last_plan("m").horizon_s == 32.0  # type: ignore[union-attr]


def test_what_an_earlier_life_learned_about_starts_is_believed() -> None:
    seen = [float(n) for n in range(1, 11)]
    assert a_bench(startups={"g": seen}).agent.startup_s("m") == 9.0
    assert a_bench(startups={"g": [99.0] * 20 + [5.0] * 20}).agent.startup_s("m") == 5.0

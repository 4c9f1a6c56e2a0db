"""Whom an engine admits first, and whom it gives up first."""

from __future__ import annotations

import math

import pytest

from swarmx.core.batching import Engine, Event, Request
from swarmx.core.engine import EngineProfile
from swarmx.core.engine_order import UniBoost, order_of


def requests_of(events: list[Event], kind: str) -> list[str]:
    return [e.request_id for e in events if e.kind == kind]


def request(name: str, prompt: int, output: int, priority: float = 0.0) -> Request:
    return Request(request_id=name, prompt_tokens=prompt, output_tokens=output, priority=priority)


def test_the_lower_priority_value_is_admitted_first_then_the_earlier() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, max_batch=1), order="priority")
    for name, priority in (("a", 5.0), ("b", 1.0), ("c", -1.0), ("d", 1.0)):
        engine.submit(request(name, 0, 3, priority), 0.0)
    assert requests_of(engine.advance(math.inf), "admitted") == ["c", "b", "d", "a"]


def test_a_request_of_a_low_value_does_not_drive_a_running_one_out_while_blocks_last() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, max_batch=1), order="priority")
    engine.submit(request("a", 0, 10, 5.0), 0.0)
    engine.submit(request("b", 0, 10, -5.0), 3.5)
    events = engine.advance(math.inf)
    assert requests_of(events, "finished") == ["a", "b"]
    assert not requests_of(events, "preempted")


@pytest.mark.parametrize(("order", "victim"), [("arrival", "c"), ("priority", "a")])
def test_the_last_in_the_order_is_given_up_first_when_blocks_run_out(order: str, victim: str) -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=1.0, kv_capacity_tokens=112)
    engine = Engine(profile, block_tokens=16, order=order)  # type: ignore[arg-type]
    for name, priority in (("a", 2.0), ("b", 1.0), ("c", 0.0)):
        engine.submit(request(name, 30, 20, priority), 0.0)
    assert requests_of(engine.advance(math.inf), "preempted")[0] == victim


def test_priorities_mean_nothing_to_an_engine_that_goes_by_arrival() -> None:
    engine = Engine(EngineProfile(model="m", device="d", step_base_s=1.0, max_batch=1))
    engine.submit(request("a", 0, 3, 5.0), 0.0)
    engine.submit(request("b", 0, 3, 1.0), 0.0)
    assert requests_of(engine.advance(math.inf), "admitted") == ["a", "b"]


def test_the_boost_is_that_of_the_paper_in_seconds() -> None:
    order = UniBoost(gamma_per_token=0.01, token_s=0.5)
    key_s = order.key(priority=0.0, ready_s=100.0, served_tokens=50)
    assert key_s == pytest.approx(100.0 - 0.5 * 100.0 * math.log(1.0 / (1.0 - math.exp(-0.5))))
    assert order.key(priority=0.0, ready_s=7.0, served_tokens=100_000) == 7.0


@pytest.mark.parametrize(("gamma_per_token", "first"), [(1e-4, "short"), (10.0, "long")])
def test_a_small_gamma_puts_short_prompts_first_and_a_large_one_goes_by_arrival(
    gamma_per_token: float, first: str
) -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=0.01, max_batch=1)
    engine = Engine(profile, order="uniboost", gamma_per_token=gamma_per_token)
    engine.submit(request("running", 10, 1000), 0.0)
    engine.submit(request("long", 4000, 5), 1.0)
    engine.submit(request("short", 40, 5), 2.0)
    assert requests_of(engine.advance(math.inf), "admitted")[1] == first


@pytest.mark.parametrize(
    ("served_tokens", "guard_tokens"), [(0, 256), (255, 256), (256, 512), (511, 512), (512, 1024), (1500, 2048)]
)
def test_a_request_is_guarded_until_it_leaves_its_bin(served_tokens: int, guard_tokens: int) -> None:
    assert UniBoost(gamma_per_token=0.01, token_s=0.5).guard_tokens(served_tokens) == guard_tokens


def test_a_guarded_request_is_not_given_up_while_there_is_another() -> None:
    profile = EngineProfile(model="m", device="d", step_base_s=1.0, kv_capacity_tokens=640)
    engine = Engine(profile, block_tokens=16, order="uniboost", gamma_per_token=10.0)  # by arrival but for the guard
    engine.submit(request("a", 250, 200), 0.0)
    engine.submit(request("b", 300, 200), 0.0)
    events = engine.advance(math.inf)
    assert requests_of(events, "preempted")[0] == "a"  # b came last, but its bin ends at 512
    assert set(requests_of(events, "finished")) == {"a", "b"}


@pytest.mark.parametrize("gamma_per_token", [0.0, -1.0, math.inf, math.nan])
def test_a_gamma_that_is_not_above_zero_is_an_error(gamma_per_token: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number above zero"):
        order_of("uniboost", gamma_per_token=gamma_per_token, token_s=1.0)


def test_a_priority_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="priority nan"):
        request("a", 1, 1, math.nan)

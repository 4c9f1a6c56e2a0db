"""The parts of the simulator by themselves: timers, figures of an outcome, forecasts, paths, and what the books say."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from eval.sim.flow import Flow, LiveCall
from eval.sim.forecasts import HISTORY, PRIOR_TOKENS, call_forecasts
from eval.sim.paths import Rest, mean_profiles, unloaded
from eval.sim.queueing import QUEUES, erlang_c, mean_time_s, pollaczek_khinchine, recursion_s, sample
from eval.sim.replicas import SimReplica
from eval.sim.settings import SimSettings
from eval.sim.simulate import simulate
from eval.sim.timers import Timers
from eval.validation import claims
from swarmx.core.batching import Request
from tests.eval.sims import LLM, call, replicas, workload


def timers() -> tuple[Timers, list[tuple[float, str]], list[tuple[float, int]]]:
    pushed: list[tuple[float, str]] = []
    asked: list[tuple[float, int]] = []
    return Timers(lambda at_s, key: pushed.append((at_s, key)), lambda at_s, n: asked.append((at_s, n))), pushed, asked


def test_a_timer_that_is_far_off_is_pushed_when_its_time_comes_near() -> None:
    made, pushed, asked = timers()
    made.start("a", 1000.0, 0.0)
    made.start("b", 1001.0, 0.0)
    assert not pushed
    ((at_s, bucket),) = asked
    assert 900.0 < at_s <= 1000.0
    made.stop("b")
    made.open(bucket)
    assert pushed == [(1000.0, "a")]
    assert made.fires("a", 1000.0)
    assert not made.fires("a", 1000.0)


def test_a_timer_that_was_replaced_or_stopped_does_not_fire() -> None:
    made, pushed, _ = timers()
    made.start("a", 1.0, 0.0)
    made.start("a", 2.0, 0.0)
    made.start("b", 3.0, 0.0)
    made.stop("b")
    assert [made.fires(key, at_s) for at_s, key in pushed] == [False, True, False]


def test_a_timer_of_the_past_runs_out_now() -> None:
    made, pushed, _ = timers()
    made.start("a", -5.0, 7.0)
    assert pushed == [(7.0, "a")]


def test_role_means_learn_from_what_finished_and_only_of_the_same_role() -> None:
    plan = workload([(0.0, [call(work=100.0), call(role="other")])])
    (flow,) = plan.workflows
    means = call_forecasts("role_means", plan)
    assert means.of(flow, flow.calls[0]).mean == PRIOR_TOKENS
    means.finished(flow, flow.calls[0])
    means.finished(flow, call(work=300.0))
    assert means.of(flow, flow.calls[0]).mean == 200.0
    assert means.of(flow, flow.calls[1]).mean == PRIOR_TOKENS


def test_role_quantiles_are_those_of_the_last_calls() -> None:
    plan = workload([(0.0, [call()])])
    (flow,) = plan.workflows
    quantiles = call_forecasts("role_quantiles", plan)
    assert quantiles.of(flow, call()).mean == PRIOR_TOKENS
    for work in [9999.0, *np.arange(1.0, HISTORY + 1.0)]:
        quantiles.finished(flow, call(work=work))
    assert quantiles.of(flow, call()).quantile(0.5) == pytest.approx((HISTORY + 1) / 2)
    assert quantiles.of(flow, call()).quantile(0.99) <= HISTORY


def test_role_means_begin_with_what_ended_before_the_first_workflow_and_each_run_begins_anew() -> None:
    plan = workload([(0.0, [call(work=400.0)])])
    flow, known = plan.workflows[0], {("report", "writer", "m"): (3, 100.0)}
    plan = msgspec.structs.replace(plan, role_means=known)
    for _ in range(2):
        means = call_forecasts("role_means", plan)
        assert means.of(flow, flow.calls[0]).mean == 100.0
        means.finished(flow, flow.calls[0])
        assert means.of(flow, flow.calls[0]).mean == pytest.approx(175.0)


@pytest.mark.parametrize("name", ["role_means", "role_quantiles"])
def test_what_a_request_tells_needs_no_history(name: str) -> None:
    plan = workload([(0.0, [call(kind="image", work=55.0)])])
    told = call_forecasts(name, plan).of(plan.workflows[0], plan.workflows[0].calls[0])  # type: ignore[arg-type]
    assert told.quantiles[0] == pytest.approx(20.0)  # that of the workload


def test_the_oracle_knows() -> None:
    plan = workload([(0.0, [call(work=77.0)])])
    assert call_forecasts("oracle", plan).of(plan.workflows[0], plan.workflows[0].calls[0]).mean == 77.0


def test_the_mean_device_takes_the_mean_time() -> None:
    fleet = [*replicas(1), *replicas(1, LLM.scaled(2.0), first=1)]
    mean_s = (LLM.alone_s(500, 80) + LLM.scaled(2.0).alone_s(500, 80)) / 2
    assert mean_profiles(fleet)["m"].alone_s(500, 80) == pytest.approx(mean_s)


def test_the_path_that_remains_is_the_longest_through_open_calls() -> None:
    (flow,) = workload([(0.0, [call(), call(work=20.0), call(after=(0, 1), gap_s=2.0)])]).workflows
    long_s, short_s = LLM.alone_s(100, 50), LLM.alone_s(100, 20)
    rest = Rest(unloaded=unloaded(flow, mean_profiles(replicas(1))), ready_s={0: 0.0, 1: 0.0})
    assert rest.unloaded.total_s == pytest.approx(2 * long_s + 2.0)
    assert rest.path_s(0.1) == pytest.approx(2 * long_s + 2.0 - 0.1)
    assert rest.path_s(1e3) == pytest.approx(long_s + 2.0)  # both are late: as if they were about to end
    del rest.ready_s[0]
    assert rest.path_s(0.0) == pytest.approx(short_s + 2.0 + long_s)
    rest.ready_s = {2: 5.0}
    assert rest.path_s(4.0) == pytest.approx(1.0 + long_s)


def test_paths_are_told_with_the_call() -> None:
    plan = workload([(0.0, [call(), call(after=(0,))])])
    told: dict[str, list[float | None]] = {}
    for path in ("none", "oracle", "oracle_call", "means", "neural"):
        told[path] = []

        def observe(router: int, message: object, now_s: float, outputs: object, into: str = path) -> None:
            if hasattr(message, "path"):
                told[into].append(None if message.path is None else message.path.mean)

        simulate(plan, replicas(1), SimSettings(path=path), observer=observe)  # type: ignore[arg-type]
    alone_s = LLM.alone_s(100, 50)
    assert told["none"] == [None, None]
    assert told["oracle"] == told["oracle_call"] == [pytest.approx(2 * alone_s), pytest.approx(alone_s)]
    assert all(seconds is not None and seconds >= 0.0 for seconds in told["means"] + told["neural"])


def a_live_call() -> LiveCall:
    (planned,) = workload([(0.0, [call()])]).workflows
    rest = Rest(unloaded=unloaded(planned, mean_profiles(replicas(1))))
    flow = Flow(planned=planned, number=0, home=0, deciders=(0,), rest=rest)
    return LiveCall(flow=flow, position=0, number=0, call_id="w0/0", planned=planned.calls[0], router=0)


def test_only_the_current_attempt_of_a_call_that_has_not_ended_is_wanted() -> None:
    live = a_live_call()
    live.attempt = 2
    assert [live.wants(live.name(attempt)) for attempt in (1, 2, 3)] == [False, True, False]
    live.ended = True
    assert not live.wants(live.name(2))


def test_a_slow_replica_has_its_events_at_their_stretched_times() -> None:
    (replica,) = replicas(1)
    sim = SimReplica(number=0, replica=replica, settings=SimSettings(), speed=1.0)
    sim.slow_down(3.0, 10.0)
    live = a_live_call()
    sim.submit(Request(request_id="a", prompt_tokens=100, output_tokens=5), live, 10.0)
    now_s, kinds = 10.0, []
    while sim.holds:
        now_s = sim.next_s() or math.nan
        for event in sim.due(now_s):
            kinds.append(event.kind)
            if event.kind == "finished":
                assert sim.finished("a", now_s) is live
    assert kinds == ["admitted", "first_token", "finished"]
    assert now_s - 10.0 == pytest.approx(3.0 * LLM.alone_s(100, 5), rel=1e-3)


def test_figures_leave_out_the_warm_up_and_tell_slow_from_refused() -> None:
    flows = [(float(i), [call()]) for i in range(9)] + [(9.0, [call(model="x")])]
    outcome = simulate(workload(flows), replicas(2))
    assert len(outcome.rows()) == 10
    assert outcome.rows(trim=0.2).tolist() == list(range(2, 10))
    assert len(outcome.latency("report")) == 9
    assert outcome.p50("report") <= outcome.p95("report") <= outcome.p99("report")
    assert outcome.missed("report", 100.0) == pytest.approx(0.1)
    assert outcome.missed("report", 0.0) == 1.0
    assert outcome.slowdown("report").max() == pytest.approx(1.0, abs=0.05)


def test_use_and_evenness_of_replicas() -> None:
    outcome = simulate(workload([(0.0, [call()]), (0.0, [call()])]), replicas(2))
    assert outcome.jain_index("m") == pytest.approx(1.0, abs=1e-3)
    alone = simulate(workload([(0.0, [call()])]), replicas(2))
    assert alone.jain_index("m") == pytest.approx(0.5)
    assert alone.utilisation("m").max() == pytest.approx(1.0, abs=0.01)


def test_a_replica_is_busy_while_it_has_a_call_and_counts_how_many() -> None:
    outcome = simulate(workload([(0.0, [call()]), (0.0, [call()]), (50.0, [call()])]), replicas(1))
    both_s = outcome.calls.end_s[:2].max()
    assert outcome.replicas.busy_s[0] == pytest.approx(both_s + outcome.calls.end_s[2] - 50.0, abs=0.01)
    assert 1.0 < outcome.replicas.mean_batch[0] < 2.0
    assert outcome.replicas.output_tokens[0] == 150


def test_the_books_agree_with_each_other() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(1.0 / 0.3)
    assert pollaczek_khinchine(0.7, 1.0) == pytest.approx(1.0 / 0.3)


QUEUE = {queue.name: queue for queue in QUEUES}


@pytest.mark.parametrize("name", ["M/M/1", "M/D/1", "M/G/1", "M/M/4"])
def test_a_queue_is_that_of_the_recursion_call_by_call(name: str) -> None:
    drawn = sample(QUEUE[name], 600, 3)
    assert mean_time_s(QUEUE[name], drawn) == pytest.approx(recursion_s(QUEUE[name].servers, drawn), rel=1e-9)


@pytest.mark.parametrize("name", ["M/M/4", "M/D/1-PS"])
def test_queues_are_as_the_books_have_them(name: str) -> None:
    assert mean_time_s(QUEUE[name], sample(QUEUE[name], 2000, 3)) == pytest.approx(QUEUE[name].expected_s, rel=0.15)


def test_a_claim_is_the_worst_error_of_its_part() -> None:
    rows = [
        {"part": "queueing", "simulated_s": 2.1, "expected_s": 2.0, "standard_error_s": 0.05, "ratio_same": 1.0},
        {"part": "emulated", "ratio_p50": 0.99, "ratio_p95": 1.2},
        {"part": "emulated", "ratio_p50": 1.05, "ratio_p95": 1.0},
    ]
    found = {each.name: each for each in claims(rows)}
    assert found["sim_vs_queueing_standard_errors"].value == pytest.approx(2.0)
    assert found["sim_vs_recursion"].met
    assert found["sim_vs_emulated_p50"].value == pytest.approx(0.05)
    assert not found["sim_vs_emulated_p95"].met
    assert "sim_vs_vllm_p50" not in found

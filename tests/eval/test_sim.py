"""The simulator: the same routers as live, every call once, and queues as the books have them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.sim.outcome import Outcome
from eval.sim.settings import SimSettings
from eval.sim.simulate import simulate
from eval.workloads.toy import toy
from swarmx.agents.policies import POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Action, Cancel, Dispatch, Refuse
from swarmx.core.errors import ConfigError
from swarmx.core.messages import Message, TimerFired
from swarmx.core.ports import Output
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell
from tests.eval.sims import LLM, call, replicas, workload

QUIET = RouterSettings(log_decisions=False, demand_every_s=0.0)
SMALL, LARGE = "llama-3.1-8b", "llama-3.1-70b-fp8"
TEXT = ("chat", "coding", "research")


def text_fleet() -> list[Any]:
    slow = LLM.scaled(0.5)
    return [*replicas(3, model=SMALL), *replicas(2, slow, model=SMALL, first=3), *replicas(3, model=LARGE)]


def arrays(outcome: Outcome) -> dict[str, np.ndarray[Any, Any]]:
    parts = {"workflows": outcome.workflows, "calls": outcome.calls, "replicas": outcome.replicas}
    return {
        f"{part}.{name}": getattr(fields, name) for part, fields in parts.items() for name in fields.__struct_fields__
    }


def everything_ended_once(outcome: Outcome) -> None:
    """Of workflows that finished, all calls did; of the refused, some did not."""
    done = ~np.isnan(outcome.calls.end_s)
    whole = np.bincount(outcome.calls.workflow[done], minlength=len(outcome.workflows.at_s)) == outcome.workflows.calls
    assert not np.isnan(outcome.workflows.end_s).any()
    assert (whole == ~outcome.workflows.refused).all()
    assert (outcome.calls.end_s[done] >= outcome.calls.ready_s[done]).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_outcome_bit_for_bit(policy: str) -> None:
    plan = toy(40, 2.0, 3, TEXT)
    router = msgspec.structs.replace(QUIET, policy=policy)
    wanted = SimSettings(router=router, token_error=0.2, speed_error=0.1, routers=2, signal_age_s=0.5)
    one, other = (arrays(simulate(plan, text_fleet(), wanted, 5)) for _ in range(2))
    for name, values in one.items():
        assert values.tobytes() == other[name].tobytes(), name


def test_another_seed_gives_other_errors() -> None:
    plan, wanted = toy(20, 2.0, 3, TEXT), SimSettings(speed_error=0.3)
    ends = [simulate(plan, text_fleet(), wanted, seed).workflows.end_s.tolist() for seed in (1, 2)]
    assert ends[0] != ends[1]


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 99),
    routers=st.integers(1, 5),
    ownership=st.sampled_from(["shared", "owned"]),
    forecast=st.sampled_from(["neural", "role_means", "role_quantiles", "oracle"]),
    path=st.sampled_from(["none", "means", "oracle", "oracle_call"]),
    stream=st.booleans(),
    network_s=st.sampled_from([0.0, 0.001, 0.2]),
)
def test_every_call_ends_once(seed: int, **about: Any) -> None:
    plan = toy(25, 3.0, seed, TEXT)
    outcome = simulate(plan, text_fleet(), SimSettings(forecast_s=about["network_s"], **about), seed)
    everything_ended_once(outcome)
    assert not outcome.workflows.refused.any()
    assert outcome.counts.dispatches == plan.calls
    assert (outcome.calls.cached_tokens <= outcome.calls.prompt_tokens).all()
    assert outcome.calls.cached_tokens.sum() == outcome.replicas.hit_tokens.sum()


class Replay:
    """A world that answers nothing: what happens is posted beforehand."""

    def __init__(self) -> None:
        self.done: list[tuple[float, Action]] = []

    def perform(self, action: Action, now_s: float) -> Iterator[tuple[float, Message]]:
        self.done.append((now_s, action))
        return iter(())


@pytest.mark.parametrize("policy", ["least_work", "random"])
def test_the_virtual_shell_decides_the_same_when_it_hears_the_same(policy: str) -> None:
    """Its timers are its own: a call that outlives the router's patience is taken back and sent elsewhere."""
    impatient = msgspec.structs.replace(
        QUIET, policy=policy, first_token_timeout_s=0.25, max_attempts=1000, models=[SMALL, LARGE]
    )
    wanted = SimSettings(router=impatient, stream=True, progress_tokens=16, drain_s=20.0)
    heard: list[tuple[float, Message]] = []
    decided: list[tuple[float, Action]] = []

    def observe(_: int, message: Message, now_s: float, outputs: Sequence[Output]) -> None:
        if not isinstance(message, TimerFired):
            heard.append((now_s, message))
        decided.extend((now_s, output) for output in outputs if isinstance(output, Dispatch | Cancel | Refuse))

    outcome = simulate(toy(40, 4.0, 1, TEXT), text_fleet(), wanted, 1, observer=observe)
    assert outcome.counts.cancels > 0
    assert outcome.counts.retries > 0
    world = Replay()
    shell = VirtualShell(Switchboard([RouterAgent(impatient)], epoch=1, journal=MemoryJournal(limit=0)), world)
    for at_s, message in heard:
        shell.post(message, at_s=at_s)
    shell.run(until_s=outcome.stopped_s)
    assert world.done == decided


def test_calls_wait_for_those_before_them_and_for_their_gap() -> None:
    flow = [call(), call(after=(0,), gap_s=3.0), call(after=(0,)), call(after=(1, 2))]
    calls = simulate(workload([(1.0, flow)]), replicas(2)).calls
    assert calls.ready_s[0] == 1.0
    assert calls.ready_s[1] == calls.end_s[0] + 3.0
    assert calls.ready_s[2] == calls.end_s[0]
    assert calls.ready_s[3] == calls.end_s[1:3].max()


def test_a_workflow_alone_takes_as_long_as_its_critical_path_and_its_messages() -> None:
    flow = [call(), call(after=(0,), work=200.0), call(after=(0,), work=20.0), call(after=(1, 2), gap_s=1.0)]
    outcome = simulate(workload([(0.0, flow)]), replicas(3), SimSettings(decision_s=0.0, forecast_s=0.0))
    unloaded_s = outcome.workflows.unloaded_s[0]
    assert unloaded_s == pytest.approx(2 * LLM.alone_s(100, 50) + LLM.alone_s(100, 200) + 1.0)
    assert outcome.workflows.end_s[0] == pytest.approx(unloaded_s + 3 * 0.002, rel=1e-3)


def test_latencies_of_messages_and_forecasts_are_charged_on_the_way() -> None:
    plan = workload([(0.0, [call(), call(after=(0,))])])
    none = SimSettings(network_s=0.0, forecast_s=0.0, decision_s=0.0)
    base_s = simulate(plan, replicas(1), none).workflows.end_s[0]
    some = SimSettings(network_s=0.01, forecast_s=0.1, decision_s=1.0)
    assert simulate(plan, replicas(1), some).workflows.end_s[0] == pytest.approx(base_s + 2 * (0.02 + 0.1 + 1.0))


def test_a_session_finds_its_prompt_in_the_cache() -> None:
    blocks = tuple(range(40))
    flow = [call(prompt_tokens=640, blocks=blocks[:10]), call(after=(0,), prompt_tokens=1280, blocks=blocks[:20])]
    outcome = simulate(workload([(0.0, flow)]), replicas(1))
    assert outcome.calls.cached_tokens.tolist() == [0, 640]


def test_a_call_for_a_model_that_nobody_serves_fails_its_workflow_only() -> None:
    plan = workload([(0.0, [call(work=400.0), call(model="x"), call(after=(0,))]), (1.0, [call()])])
    outcome = simulate(plan, replicas(1))
    assert outcome.workflows.refused.tolist() == [True, False]
    assert outcome.counts.cancels == 1
    assert math.isnan(outcome.calls.ready_s[2])
    everything_ended_once(outcome)
    assert outcome.missed("report", 100.0) == 0.5


def test_a_call_that_no_replica_can_hold_is_refused() -> None:
    outcome = simulate(workload([(0.0, [call(prompt_tokens=64 * 400)])]), replicas(1))
    assert outcome.workflows.refused.tolist() == [True]


def test_an_overloaded_run_ends_and_counts_what_is_left_as_missed() -> None:
    plan = workload([(0.01 * i, [call(work=400.0)]) for i in range(200)])
    outcome = simulate(plan, replicas(1), SimSettings(drain_s=20.0))
    assert outcome.stopped_s == pytest.approx(1.99 + 20.0)
    left = np.isnan(outcome.workflows.end_s)
    assert 0 < left.sum() < 200
    assert outcome.missed("report", 1e9) == pytest.approx(left.mean())
    assert outcome.latency("report").max() <= outcome.stopped_s


def test_priorities_of_the_router_reach_engines_that_order_by_them() -> None:
    """The urgency of a dispatch is the priority of the request; nothing else tells the two orders apart."""
    plan = workload([(0.001 * i, [call()]) for i in range(60)])
    router = msgspec.structs.replace(QUIET, late_binding=False)
    ends = {
        order: simulate(plan, replicas(1), SimSettings(router=router, order=order)).workflows.end_s.tolist()
        for order in ("arrival", "priority")
    }
    assert ends["arrival"] == ends["priority"]  # least_work sets no urgency


def test_owners_alone_decide_about_their_models() -> None:
    told: dict[int, set[str]] = {}

    def observe(router: int, message: Message, now_s: float, outputs: Sequence[Output]) -> None:
        models = {o.replica_id.rstrip("0123456789") for o in outputs if isinstance(o, Dispatch)}
        told.setdefault(router, set()).update(models)

    simulate(toy(30, 3.0, 1, TEXT), text_fleet(), SimSettings(routers=7, ownership="owned"), 1, observer=observe)
    owners = [models for models in told.values() if models]
    assert sum(map(len, owners)) == 2  # each model has one owner


def test_forwarded_calls_travel_once_more() -> None:
    plan = workload([(0.1 * i, [call()]) for i in range(20)])
    waits = {}
    for ownership in ("shared", "owned"):
        outcome = simulate(plan, replicas(9), SimSettings(routers=4, ownership=ownership, network_s=0.05))
        waits[ownership] = np.unique(np.round(outcome.calls.dispatched_s - outcome.calls.ready_s, 6)).tolist()
    assert len(waits["shared"]) == 1
    assert waits["owned"] == [waits["shared"][0], pytest.approx(waits["shared"][0] + 0.05)]


def test_routers_hear_signals_that_are_as_old_as_the_settings_say() -> None:
    ages = []

    def observe(router: int, message: Message, now_s: float, outputs: Sequence[Output]) -> None:
        if hasattr(message, "measured_at_s"):
            ages.append(now_s - message.measured_at_s)

    simulate(toy(5, 1.0, 1, TEXT), text_fleet(), SimSettings(signal_age_s=2.5, routers=2), 1, observer=observe)
    assert len(ages) > 20
    assert np.allclose(ages, 2.5)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"after": (0,)}, "earlier"),
        ({"gap_s": -1.0}, "gap"),
        ({"gap_s": math.nan}, "gap"),
        ({"prompt_tokens": -1}, "prompt"),
        ({"work": 0.0}, "work"),
        ({"work": math.inf}, "work"),
        ({"forecast": 9}, "forecast"),
    ],
)
def test_a_call_that_makes_no_sense_is_named(changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"call 0 of workflow 'w0'.*{wrong}"):
        simulate(workload([(0.0, [call(**changes)])]), replicas(1))


@pytest.mark.parametrize("times", [(-1.0,), (2.0, 1.0), (math.nan,), (math.inf,)])
def test_arrivals_that_make_no_sense_are_named(times: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="is submitted at"):
        simulate(workload([(t, [call()]) for t in times]), replicas(1))


def test_workflows_and_replicas_need_names_of_their_own() -> None:
    twice = workload([(0.0, [call()])])
    twice = msgspec.structs.replace(twice, workflows=[*twice.workflows, *twice.workflows])
    with pytest.raises(ConfigError, match="two workflows"):
        simulate(twice, replicas(1))
    with pytest.raises(ConfigError, match="two replicas"):
        simulate(workload([(0.0, [call()])]), [*replicas(1), *replicas(1)])
    with pytest.raises(ConfigError, match="no calls"):
        simulate(workload([(0.0, [])]), replicas(1))


def test_nothing_to_do_takes_no_time() -> None:
    outcome = simulate(workload([]), replicas(2))
    assert outcome.stopped_s == 0.0
    assert math.isnan(outcome.p99())


@pytest.mark.parametrize("changes", [{"network_s": -1.0}, {"drain_s": math.inf}, {"routers": 0}, {"signal_age_s": -1}])
def test_settings_that_make_no_sense_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SimSettings(**changes)

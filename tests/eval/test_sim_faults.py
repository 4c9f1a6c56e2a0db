"""Crashes, drains, returns and slow replicas in the simulator: nothing is lost, whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.sim.faults import spot_faults
from eval.sim.settings import Fault, SimSettings
from eval.sim.simulate import simulate
from eval.sim.world import World
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.errors import ConfigError
from swarmx.core.messages import CallFailed, CallFinished, Message, ReplicaChanged
from swarmx.core.ports import Output
from tests.eval.sims import LLM, call, replicas, workload
from tests.eval.test_sim import everything_ended_once

IMPATIENT = RouterSettings(log_decisions=False, demand_every_s=0.0, queue_timeout_s=5.0, call_timeout_s=6.0)
FLOW = (call(work=120.0), call(after=(0,), work=80.0), call(after=(0,), gap_s=0.3), call(after=(1, 2)))

faults = st.lists(
    st.builds(
        Fault,
        at_s=st.floats(0.0, 12.0),
        replica_id=st.sampled_from(["m0", "m1", "m2"]),
        kind=st.sampled_from(["crash", "drain", "return", "slow"]),
        factor=st.sampled_from([0.5, 1.0, 3.0, 50.0]),
        notice_s=st.sampled_from([0.0, 0.5, 3.0, float("inf")]),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(
    faults=faults,
    stream=st.booleans(),
    routers=st.sampled_from([1, 3]),
    network_s=st.sampled_from([0.0, 0.001, 0.4]),
    late_binding=st.booleans(),
)
def test_whatever_breaks_every_workflow_ends_exactly_once(
    faults: list[Fault], stream: bool, routers: int, network_s: float, late_binding: bool
) -> None:
    wanted = SimSettings(
        router=msgspec.structs.replace(IMPATIENT, late_binding=late_binding),
        faults=tuple(faults), stream=stream, routers=routers, network_s=network_s, start_s=2.0, progress_tokens=16,
    )  # fmt: skip
    world = World(workload([(0.4 * i, FLOW) for i in range(25)]), replicas(3), wanted, 0)
    ended: dict[str, int] = {}

    def observe(number: int, message: Message, now_s: float, outputs: Sequence[Output]) -> None:
        world.routers[number].validate()
        if isinstance(message, CallFinished):
            ended[message.call_id] = ended.get(message.call_id, 0) + 1

    world._observer = observe
    world.run()
    outcome = world.ledger.outcome(world.machines.all, stopped_s=world.now_s, events=0, wall_s=0.0, cpu_s=0.0)
    everything_ended_once(outcome)
    assert set(ended.values()) <= {1}
    assert len(ended) == (~np.isnan(outcome.calls.end_s)).sum()
    assert not world.clients.live
    assert all(router.in_flight(r.replica_id) == 0 for router in world.routers for r in replicas(3))


def run(*faults: Fault, flows: int = 1, later_s: float = 0.0, **about: Any) -> tuple[Any, list[tuple[float, Message]]]:
    heard: list[tuple[float, Message]] = []

    def observe(router: int, message: Message, now_s: float, outputs: Sequence[Output]) -> None:
        heard.append((now_s, message))

    times = [0.001 * i for i in range(flows)] + ([later_s] if later_s else [])
    plan = workload([(at_s, [call(work=400.0)]) for at_s in times])
    wanted = SimSettings(router=IMPATIENT, faults=faults, signal_every_s=0.0, **about)
    return simulate(plan, replicas(2), wanted, observer=observe), heard


def states(heard: list[tuple[float, Message]], replica_id: str) -> list[tuple[float, str]]:
    return [
        (round(at_s, 6), message.state)
        for at_s, message in heard
        if isinstance(message, ReplicaChanged) and message.replica.replica_id == replica_id
    ]


def both(kind: Any, at_s: float, **about: Any) -> list[Fault]:
    return [Fault(at_s=at_s, replica_id=replica_id, kind=kind, **about) for replica_id in ("m0", "m1")]


def test_a_crash_breaks_connections_at_once_and_is_noticed_later() -> None:
    outcome, heard = run(Fault(at_s=1.0, replica_id="m0", kind="crash"), flows=6, gone_after_s=0.5)
    failures = [(round(at_s, 6), m.reason) for at_s, m in heard if isinstance(m, CallFailed)]
    assert failures
    assert set(failures) == {(1.001, "connection_lost")}
    assert states(heard, "m0")[-1] == (1.5, "gone")
    assert (outcome.calls.attempts > 1).sum() == len(failures)
    assert not outcome.workflows.refused.any()


def test_an_answer_that_was_streaming_is_not_tried_again() -> None:
    outcome, _ = run(*both("crash", 1.0), stream=True)
    assert outcome.workflows.refused.tolist() == [True]
    assert outcome.calls.attempts.tolist() == [1]


def test_a_replica_that_returns_starts_first() -> None:
    _, heard = run(*both("crash", 0.5), *both("return", 1.0), flows=1, later_s=4.0, gone_after_s=9.0, start_s=2.0)
    assert states(heard, "m0")[1:] == [(1.0, "gone"), (1.0, "starting"), (3.0, "ready")]


def test_a_drain_lets_calls_finish() -> None:
    outcome, heard = run(*both("drain", 0.5), flows=4)
    assert not outcome.workflows.refused.any()
    assert (outcome.calls.attempts == 1).all()
    assert [state for _, state in states(heard, "m0")] == ["ready", "draining"]


def test_a_drain_that_runs_out_of_time_is_a_crash() -> None:
    outcome, heard = run(Fault(at_s=0.5, replica_id="m0", kind="drain", notice_s=0.5), flows=4, gone_after_s=0.1)
    assert states(heard, "m0")[1:] == [(0.5, "draining"), (1.1, "gone")]
    assert (outcome.calls.attempts == 2).any()
    assert not outcome.workflows.refused.any()


def test_a_slow_replica_takes_its_factor_longer() -> None:
    def took_s(factor: float) -> float:
        slow = Fault(at_s=0.0, replica_id="m0", kind="slow", factor=factor)
        wanted = SimSettings(network_s=0.0, forecast_s=0.0, decision_s=0.0, faults=(slow,))
        return float(simulate(workload([(1.0, [call()])]), replicas(1), wanted).calls.end_s[0]) - 1.0

    assert took_s(4.0) == pytest.approx(4.0 * took_s(1.0), rel=1e-6)


def test_a_replica_that_slows_down_half_way_finishes_later() -> None:
    whole_s = LLM.alone_s(100, 50)
    slow = Fault(at_s=whole_s / 2, replica_id="m0", kind="slow", factor=3.0)
    end_s = simulate(workload([(0.0, [call()])]), replicas(1), SimSettings(faults=(slow,))).calls.end_s[0]
    assert end_s == pytest.approx(whole_s / 2 * 4.0, rel=0.03)


def test_a_fault_of_nobody_is_named() -> None:
    with pytest.raises(ConfigError, match="'x'"):
        run(Fault(at_s=1.0, replica_id="x", kind="crash"))


SPOT = "trace,provider,gpu,t_s,event,node\n"


def spot(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "node_events.csv"
    path.write_text(SPOT + "".join(f"t,aws,V100,{line}\n" for line in lines))
    return path


def test_nodes_of_a_spot_trace_take_their_replicas_with_them(tmp_path: Path) -> None:
    path = spot(tmp_path, "0.0,add,a", "0.0,add,b", "5.0,remove,a", "6.0,add,c", "7.0,add,d", "8.0,add,e")
    found = spot_faults(path, "t", ["r0", "r1", "r2"], stretch=2.0)
    assert [(f.at_s, f.replica_id, f.kind) for f in found] == [
        (0.0, "r2", "crash"),
        (10.0, "r0", "crash"),
        (12.0, "r2", "return"),
        (14.0, "r0", "return"),
    ]


def test_a_notice_makes_it_a_drain(tmp_path: Path) -> None:
    path = spot(tmp_path, "0.0,add,a", "5.0,remove,a")
    (fault,) = spot_faults(path, "t", ["r0"], notice_s=30.0)
    assert (fault.kind, fault.notice_s) == ("drain", 30.0)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (["x,add,a"], "line 2"),
        (["-1.0,add,a"], "line 2"),
        (["nan,add,a"], "line 2"),
        (["1.0,explode,a"], "line 2"),
        (["1.0,add,"], "line 2"),
        (["1.0,add"], "line 2"),
        (["2.0,add,a", "1.0,remove,a"], "line 3.*back in time"),
        ([], "no events"),
    ],
)
def test_a_spot_trace_that_makes_no_sense_is_named(tmp_path: Path, lines: list[str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        spot_faults(spot(tmp_path, *lines), "t", ["r0"])


def test_a_file_that_is_no_spot_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    with pytest.raises(ConfigError, match="cannot be read"):
        spot_faults(path, "t", ["r0"])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no column"):
        spot_faults(path, "t", ["r0"])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        spot_faults(path, "t", ["r0"])

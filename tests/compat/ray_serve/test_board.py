"""The board of signals, the options of a router, and when silent workflows end; no Ray in it."""

import asyncio

import pytest

from eval.ray_serve_virtual import VirtualLoop
from swarmx.compat.ray_serve.board import Board
from swarmx.compat.ray_serve.options import RouterOptions, read_options
from swarmx.compat.ray_serve.signals import ReplicaSignal, RouterReport, packed, report_in, signal_in
from swarmx.compat.ray_serve.workflows import SilentWorkflows
from swarmx.core.errors import ConfigError
from swarmx.core.messages import Message, WorkflowEnded, WorkflowSubmitted
from swarmx.runtime.clock import WallClock
from tests.compat.ray_serve.test_desk import demand, desk, ticket


def said(replica_id: str, running: int, deployment: str = "app/m") -> bytes:
    return packed(ReplicaSignal(deployment=deployment, replica_id=replica_id, at_s=1.0, running=running))


async def test_a_reader_gets_what_is_new_of_its_deployment_and_each_replica_once() -> None:
    board = Board()
    for data in (said("r0", 1), said("r1", 1), said("r0", 2), said("x", 9, "other")):
        await board.push(data)
    after, news = await board.news("app/m", 0)
    assert [(s.replica_id, s.running) for s in map(signal_in, news)] == [("r1", 1), ("r0", 2)]
    await board.push(said("r1", 0))
    _, news = await board.news("app/m", after)
    assert [(s.replica_id, s.running) for s in map(signal_in, news)] == [("r1", 0)]


async def test_a_reader_waits_for_news_and_several_are_woken_by_the_same() -> None:
    board = Board()
    readers = [asyncio.ensure_future(board.news("app/m", 0)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(reader.done() for reader in readers)
    await board.push(said("r0", 1))
    for _, news in await asyncio.gather(*readers):
        assert len(news) == 1


async def test_the_newest_report_of_each_router_is_kept() -> None:
    board = Board()
    for router, at_s in (("a", 1.0), ("b", 1.0), ("a", 2.0)):
        await board.report(packed(RouterReport(deployment="app/m", router=router, at_s=at_s, demand=demand())))
    found = [report_in(data) for data in await board.reports("app/m")]
    assert [(report.router, report.at_s) for report in found] == [("b", 1.0), ("a", 2.0)]
    assert await board.reports("other") == []


def test_options_are_read_strictly_and_name_the_nearest() -> None:
    assert read_options({}) == RouterOptions()
    options = read_options({"served_model": "qwen3-8b", "device": "l40s", "retries": 2, "retry_methods": ["chat"]})
    assert options.engine("app/m").model == "app/m"
    assert read_options({"profile": {"step_base_s": 0.5}}).engine("m").step_base_s == 0.5
    with pytest.raises(ConfigError, match="Did you mean 'policy'"):
        read_options({"polcy": "marginal"})
    for wrong in ({"policy": "x"}, {"retries": 1}, {"retries": "many"}, {"look_again_s": 0.0}):
        with pytest.raises(ConfigError):
            read_options(wrong)
    for wrong in ({"device": "abacus", "served_model": "x"}, {"profile": {"speed": 1.0}}):
        with pytest.raises(ConfigError):
            read_options(wrong).engine("m")


async def test_a_workflow_ends_once_it_has_been_silent_and_its_end_is_its_last_answer() -> None:
    told: list[tuple[Message, float]] = []
    clock = WallClock()
    workflows = SilentWorkflows(idle_s=0.02, clock=clock, post=lambda message, at_s: told.append((message, at_s)))
    at = desk()
    call = ticket(at).call
    workflows.enter(call)
    workflows.enter(call)
    workflows.leave(call)
    await asyncio.sleep(0.05)
    assert [type(message) for message, _ in told] == [WorkflowSubmitted]  # one call is open still
    workflows.leave(call)
    over_s = clock.now_s()
    while len(workflows):
        await asyncio.sleep(0.01)
    assert isinstance(told[-1][0], WorkflowEnded)
    assert told[-1][1] <= over_s
    workflows.close()
    at.close()


def test_a_workflow_whose_calls_come_and_go_ends_when_it_has_been_silent_for_long_enough() -> None:
    told: list[tuple[Message, float]] = []
    loop = VirtualLoop()

    async def story() -> None:
        at = desk()
        call = ticket(at).call
        at.close()
        workflows = SilentWorkflows(idle_s=4.0, clock=loop, post=lambda message, at_s: told.append((message, at_s)))
        for _ in range(6):
            workflows.enter(call)
            await asyncio.sleep(3.0)
            workflows.leave(call)
            await asyncio.sleep(3.0)
            assert len(workflows) == 1
        await asyncio.sleep(0.9)
        assert len(workflows) == 1
        await asyncio.sleep(0.2)
        assert len(workflows) == 0

    loop.run_until_complete(story())
    loop.close()
    assert [(type(message), at_s) for message, at_s in told] == [(WorkflowSubmitted, 0.0), (WorkflowEnded, 33.0)]

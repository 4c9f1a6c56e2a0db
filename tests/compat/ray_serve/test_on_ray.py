"""Unchanged Serve apps on a real local Ray, with SwarmX named in their config."""

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compat.ray_serve.conftest import HAS_RAY, NO_RAY

pytestmark = [
    pytest.mark.skipif(not HAS_RAY, reason=NO_RAY),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(420),
    pytest.mark.process,
]

MODEL = {"num_replicas": 2}


@pytest.fixture(scope="module")
def apps(cluster: Path) -> Path:
    """Four applications, deployed by one config as `serve deploy` does."""
    from tests.compat.ray_serve.deploy import config, deploy_all

    kwargs = {
        "log_dir": str(cluster),
        "journal": True,
        "retries": 3,
        "retry_methods": ["__call__", "dies"],
        "predictor": "empirical",
    }
    scaled = config("scaled", {"max_ongoing_requests": 8}, {"predictor": "empirical"})
    scaled["deployments"][0]["autoscaling_config"] = {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 1000,  # Serve's own policy would never want a second one
        "upscale_delay_s": 0.2,
        "downscale_delay_s": 600,
        "look_back_period_s": 1.0,
        "metrics_interval_s": 0.3,
        "policy": {
            "policy_function": "swarmx.compat.ray_serve:ScalePolicy",
            "policy_kwargs": {"parameters": {"target_in_flight": 2.0}, "every_s": 0.3, "up_cooldown_s": 0.5},
        },
    }
    external = config("external", {"num_replicas": 1}, None) | {"external_scaler_enabled": True}
    deploy_all(
        [
            config("plain", MODEL, kwargs, hook=True),
            config("wrong", MODEL, {"no_such_option": 1}),
            scaled,
            external,
        ],
        patience_s=300.0,
    )
    return cluster


def handle_of(app: str) -> Any:
    from ray import serve

    return serve.get_deployment_handle("Model", app)


def status_of(handle: Any) -> dict[str, Any]:
    from tests.compat.ray_serve.deploy import router_of

    found: dict[str, Any] = router_of(handle).swarmx_status()
    return found


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    for _ in range(int(seconds / 0.2)):
        if condition():
            return True
        await asyncio.sleep(0.2)
    return condition()


def posted(path: str, body: bytes) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:8123{path}", data=body)
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # loopback
        return json.loads(response.read())


async def test_requests_of_every_shape_are_routed_by_swarmx_and_answered(apps: Path) -> None:
    handle = handle_of("plain")
    for asked in ("a text", {"prompt": "p", "words": 3}, {"messages": [{"role": "user", "content": "hi"}]}, 7, None):
        assert (await handle.remote(asked))["text"]
    assert [word async for word in handle.options(stream=True).stream.remote(3)] == ["0", "1", "2"]
    status = status_of(handle)
    assert status["in_charge"] == "swarmx"
    assert status["stood_in"] == status["faults"] == 0


async def test_many_requests_at_a_time_use_every_replica_and_none_is_lost(apps: Path) -> None:
    handle = handle_of("plain")
    answers = await asyncio.gather(*[handle.remote({"prompt": str(n), "seconds": 0.05}) for n in range(60)])
    assert set(Counter(answer["replica"] for answer in answers).values()) != {60}
    status = status_of(handle)
    assert status["waiting"] == 0
    assert len(status["added_s"]) == len(status["decision_s"]) == len(status["decision_busy_s"])
    assert min(status["added_s"]) > 0.0


async def test_several_calls_of_one_ingress_request_do_not_take_each_others_place(apps: Path) -> None:
    answers = await asyncio.gather(*[asyncio.to_thread(posted, "/plain", b"hello") for _ in range(5)])
    assert answers == [{"answers": 4}] * 5


async def test_what_the_router_brings_is_frozen_where_serve_has_frozen_what_there_was(apps: Path) -> None:
    from ray import serve

    await asyncio.to_thread(posted, "/plain", b"hello")
    ingress = serve.get_deployment_handle("Ingress", "plain")
    assert not await ingress.collected.remote("ray")
    assert not await ingress.collected.remote("numba")


async def test_an_error_of_the_app_reaches_the_caller_as_it_is(apps: Path) -> None:
    handle = handle_of("plain")
    with pytest.raises(Exception, match="no answer to this"):
        await handle.fails.remote("this")
    assert (await handle.remote("and goes on"))["text"]


async def test_a_cancelled_request_gives_its_place_back(apps: Path) -> None:
    from tests.compat.ray_serve.deploy import router_of

    handle = handle_of("plain")
    await handle.remote("first")
    running = [handle.remote({"seconds": 30.0}) for _ in range(3)]
    await asyncio.sleep(0.5)
    for response in running:
        response.cancel()
    desk = router_of(handle)._desk
    assert await until(lambda: not desk._tickets, 20.0)


async def test_the_request_of_a_replica_that_died_is_answered_by_another_under_the_same_key(
    apps: Path, tmp_path: Path
) -> None:
    handle = handle_of("plain")
    first, second = (await handle.dies.remote(str(tmp_path / "marker"))).split(" ")
    assert first == second != ""


async def test_who_cancels_while_a_request_is_being_sent_again_has_it_sent_to_nobody(
    apps: Path, tmp_path: Path
) -> None:
    from tests.compat.ray_serve.deploy import router_of

    handle = handle_of("plain")
    marker = tmp_path / "marker"
    await handle.remote("first")
    assert await until(lambda: len(router_of(handle)._replicas) == 2), "one may have been lost in another test"
    before = status_of(handle)["decided"]
    asked = [handle.remote({"seconds": 6.0}) for _ in range(7)]  # of the eight places there is one left
    assert await until(lambda: status_of(handle)["decided"] == before + 7)
    lost = handle.dies.remote(str(marker))
    ends = [asyncio.ensure_future(end_of(response)) for response in (lost, *asked)]
    assert await until(lambda: status_of(handle)["waiting"] == 4, 20.0), "what a replica had waits for the other one"
    lost.cancel()
    assert await asyncio.gather(*ends) == ["RequestCancelledError"] + [""] * 7
    assert (await handle.remote("and goes on"))["text"]
    assert not (tmp_path / "marker-again").exists()


async def end_of(response: Any) -> str:
    """The name of the error, if it was one."""
    try:
        await response
    except BaseException as error:
        return type(error).__name__
    return ""


async def test_a_method_that_may_not_be_repeated_is_not(apps: Path, tmp_path: Path) -> None:
    from ray.exceptions import RayActorError

    handle = handle_of("scaled")
    with pytest.raises(RayActorError):
        await handle.dies.remote(str(tmp_path / "marker"))


async def test_replicas_push_how_fast_they_are(apps: Path) -> None:
    from tests.compat.ray_serve.deploy import router_of

    handle = handle_of("plain")

    def fast() -> list[float]:
        known = router_of(handle)._desk._known.values()
        return [one.said_at_s for one in known if one.told_calls > 0]

    for _ in range(40):
        await asyncio.gather(*[handle.remote({"seconds": 0.05, "words": 20}) for _ in range(4)])
        if len(fast()) >= 1:
            break
    assert fast()


async def test_each_decision_is_in_a_file_and_a_replay_makes_the_same(apps: Path) -> None:
    import msgspec

    from swarmx.core.nouns import Decision
    from swarmx.runtime.journal import replay

    handle = handle_of("plain")
    await handle.remote("one more")
    await asyncio.sleep(2.5)
    lines = [line for path in apps.glob("*.decisions.jsonl") for line in path.read_bytes().splitlines()]
    assert len([msgspec.json.decode(line, type=Decision) for line in lines]) >= 1
    for journal in apps.glob("*.journal.jsonl"):
        assert replay(journal).divergence is None


async def test_options_that_cannot_be_read_leave_serves_own_router_in_charge(apps: Path) -> None:
    handle = handle_of("wrong")
    assert (await handle.remote("hello"))["text"]
    status = status_of(handle)
    assert status["in_charge"] == "PowerOfTwoChoicesRequestRouter"
    assert "no_such_option" in status["absent"]


async def test_a_process_without_swarmx_routes_as_serve_does(apps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "swarmx.compat.ray_serve.options", None)
    handle = handle_of("external").options()  # a deployment with Serve's router: the same handle, for comparison
    assert (await handle.remote("hello"))["text"]
    handle = handle_of("scaled").options(session_id="new")
    from tests.compat.ray_serve.deploy import router_of

    router = router_of(handle)
    router.initialize_state()
    router._rests_until = 0.0
    assert (await handle.remote("hello"))["text"]
    assert "not installed" in router.swarmx_status()["absent"]


async def test_an_agent_that_raises_costs_no_request_and_rests_after_a_while(apps: Path) -> None:
    from tests.compat.ray_serve.deploy import router_of

    handle = handle_of("plain")
    await handle.remote("first")
    router = router_of(handle)
    router._desk.ask = None  # whoever calls this fails
    try:
        for number in range(8):
            assert (await handle.remote(f"number {number}"))["text"]
        status = status_of(handle)
        assert status["faults"] >= 5
        assert status["in_charge"] == "PowerOfTwoChoicesRequestRouter"
    finally:
        del router._desk.ask
        router._rests_until = 0.0


async def test_the_scaler_agent_scales_by_the_policy_in_the_config(apps: Path) -> None:
    from ray import serve

    handle = handle_of("scaled")

    def running() -> int:
        return int(serve.status().applications["scaled"].deployments["Model"].replica_states.get("RUNNING", 0))

    ends_s = time.monotonic() + 60.0
    while time.monotonic() < ends_s and running() < 3:
        await asyncio.gather(*[handle.remote({"seconds": 0.5}) for _ in range(8)])
    assert running() == 3


async def test_an_external_scaler_tells_serve_how_many(apps: Path) -> None:
    from swarmx.compat.ray_serve.external import ExternalScaler, ServeRest
    from swarmx.compat.ray_serve.planner import Planner, PlannerOptions
    from swarmx.core.errors import ReplicaError

    rest = ServeRest(f"http://{os.environ['RAY_DASHBOARD']}")
    options = PlannerOptions(parameters={"target_in_flight": 1.0}, up_cooldown_s=0.0)
    planner = Planner("external/Model", options)
    busy = [planner.load(running=2.0, waiting=0.0, window_s=1.0)]
    scaler = ExternalScaler(rest, planner, app="external", deployment="Model", least=1, most=2, demand=lambda: busy)
    assert await asyncio.to_thread(scaler.step, time.time()) == 2
    assert await asyncio.to_thread(rest.running, "external", "Model") != (0, 0)
    assert (await asyncio.to_thread(rest.running, "external", "Model"))[1] == 2
    with pytest.raises(ReplicaError, match="external_scaler_enabled"):
        await asyncio.to_thread(rest.scale, "plain", "Model", 3)

"""`routed` over functions and actors of a real Ray, in a program of its own that joins the cluster of the tests."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.core.nouns import Decision
from tests.e2e.fleet import Server, serving
from tests.providers.ray.conftest import HAS_RAY, NO_RAY, ROOT, Nodes

pytestmark = [
    pytest.mark.skipif(not HAS_RAY, reason=NO_RAY),
    pytest.mark.process,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def found(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program printed, its decisions, and what a gateway that was sent those of `square` says of them."""
    folder = tmp_path_factory.mktemp("decisions")
    fleet = {"emulated": [{"model": "qwen3-8b", "device": "l40s", "count": 1}]}  # it would not run without any
    with serving(fleet, tmp_path_factory.mktemp("gateway")) as gateway:
        command = [sys.executable, "-m", "tests.providers.ray.program", nodes.address, str(folder), gateway.url]
        env = {**os.environ, "SWARMX_TOKEN": gateway.token}
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
        assert run.returncode == 0, run.stderr[-4000:]
        lines = [line for path in Path(folder).glob("*.jsonl") for line in path.read_bytes().splitlines()]
        decisions = [msgspec.json.decode(line, type=Decision) for line in lines]
        calls = {decision.call.call_id for decision in decisions if decision.call.model == "square"}
        said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return said | {"decisions": decisions, "explained": asyncio.run(explained(gateway, calls))}


async def explained(gateway: Server, calls: Iterable[str]) -> dict[str, str]:
    """How the gateway explains the decisions of each call."""
    async with gateway.http() as client:
        told = {call_id: (await client.get(f"/api/v1/calls/{call_id}/why")).body for call_id in calls}
    return {call_id: " ".join(why["decisions"][0]["explanation"]) for call_id, why in told.items()}


def test_a_reference_is_rays_own_and_can_be_given_to_other_calls(found: dict[str, Any]) -> None:
    assert found["is_object_ref"]
    assert found["chained"] == 6


def test_the_fast_actor_gets_more_calls_once_durations_are_known(found: dict[str, Any]) -> None:
    fast, slow = found["shares"]
    assert fast > 2 * slow


def test_calls_of_a_function_run_on_nodes_that_have_what_it_takes(found: dict[str, Any]) -> None:
    assert set(found["nodes"]) <= set(found["able"])
    assert found["function_stood_in"] == 0


def test_options_that_say_where_are_obeyed(found: dict[str, Any]) -> None:
    assert found["pinned"] == found["pinned_to"]


def test_the_programs_own_errors_come_as_they_are_and_lose_no_place(found: dict[str, Any]) -> None:
    assert found["error"] == "ValueError"
    assert set(found["in_flight"].values()) == {0}


def test_an_actor_that_died_gets_no_further_call(found: dict[str, Any]) -> None:
    assert found["lost"] == "ActorDiedError"
    assert found["after_loss"] == found["after_loss_expected"]


def test_where_swarmx_fails_the_call_goes_as_ray_would_have_it(found: dict[str, Any]) -> None:
    assert found["stood_in_answers"] == [1, 4, 9]
    assert found["stood_in"] == 3


def test_another_process_gets_rays_own_function(found: dict[str, Any]) -> None:
    assert found["nested"] == 16


def test_each_decision_is_kept(found: dict[str, Any]) -> None:
    models = {decision.call.model for decision in found["decisions"]}
    assert models == {"square", "Worker"}
    assert all(decision.call.workflow_kind == "report" for decision in found["decisions"])


def test_a_gateway_that_is_sent_the_decisions_explains_them(found: dict[str, Any]) -> None:
    assert len(found["explained"]) == 2  # as many calls of `square` were placed here, and not by Ray
    assert all("square" in told for told in found["explained"].values())

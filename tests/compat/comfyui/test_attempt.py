"""What an attempt hears of its nodes, and what a forecaster is told of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from swarmx.compat.comfyui.attempt import Attempt
from swarmx.compat.comfyui.forecasts import JobFacts, NodeForecaster, ServerState
from swarmx.compat.comfyui.settings import FrontSettings
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import front


def attempt(times: Iterator[float]) -> Attempt:
    settings = FrontSettings.model_validate({"servers": [{"name": "s", "url": "http://127.0.0.1:1"}]})
    server: Any = None  # it is not asked here
    return Attempt("job", server, settings, lambda: next(times))


def at(node: str | None, **more: str) -> tuple[str, dict[str, Any]]:
    return "executing", {"node": node, "prompt_id": "job", **more}


def test_nodes_take_the_time_until_the_next_one_begins() -> None:
    made = attempt(iter([0.0, 1.0, 3.0, 3.5]))
    for kind, data in (("execution_start", {}), at("4"), at("3"), at(None)):
        made.heard(kind, data)
    assert made.node_seconds(whole=True) == {"4": 2.0, "3": 0.5}


def test_what_a_node_was_expanded_into_counts_as_that_node() -> None:
    made = attempt(iter([0.0, 1.0, 3.0, 3.5, 4.0]))
    inner = at("5.0.1", display_node="5")
    for kind, data in (("execution_start", {}), at("5", display_node="5"), inner, at("6"), at(None)):
        made.heard(kind, data)
    assert made.node_seconds(whole=True) == {"5": 2.5, "6": 0.5}


@pytest.mark.parametrize("missed", ["begin", "end"])
def test_nodes_of_which_some_may_have_been_missed_have_no_times(missed: str) -> None:
    made = attempt(iter([0.0, 1.0, 3.0, 3.5]))
    events = [("execution_start", {}), at("4"), at("3"), at(None)]
    for kind, data in events[1:] if missed == "begin" else events[:-1]:
        made.heard(kind, data)
    assert made.node_seconds(whole=True) == {}
    assert made.node_seconds(whole=False) == ({} if missed == "begin" else {"4": 2.0})


class Noting(NodeForecaster):
    """A forecaster that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[float, Mapping[str, float]]] = []

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        self.told.append((seconds, dict(nodes)))
        super().ended(facts, server, seconds, nodes)


@pytest.mark.process
async def test_a_front_learns_from_the_nodes_that_ran_and_from_whole_jobs_of_a_server_that_says_nothing(
    tmp_path: Path,
) -> None:
    # Its sampler takes 80 ms: the event that it begins may be heard later than it was sent, and that of its end not.
    fake, noting = FakeComfy(step_s=0.02), Noting()
    async with serving(fake), front(tmp_path, fake, forecaster=noting) as client:
        await client.run(graph(1))
        await client.run(graph(2))
        fake.mute = True
        _, answer = await client.submit(graph(3))
        await client.ended(answer["prompt_id"])
    (first_s, first), (_, second), (_, third) = noting.told
    assert first.keys() == {"3", "4", "5", "6", "7", "8", "9"}
    assert max(first, key=first.__getitem__) == "3"
    assert 0.04 <= first["3"] <= sum(first.values()) <= first_s
    assert second.keys() == {"3", "8", "9"}, "the rest is cached"
    assert third == {}

"""The comparison inside Ray Serve, as far as it needs no Ray."""

from itertools import pairwise
from pathlib import Path

import pytest

from eval.ray_serve import OURS, ROUTERS, config, plan
from eval.ray_serve_plan import parser_of, seeds_of


def test_every_router_gets_the_same_workflows_at_the_same_times() -> None:
    one, two = (plan(20, 2.0, seed=3, prompts=None) for _ in range(2))
    assert one == two
    assert plan(20, 2.0, seed=4, prompts=None) != one
    assert [len(stage) for stage in one[0].stages] == [1, 3, 1]
    assert all(first.at_s < second.at_s for first, second in pairwise(one))


def test_the_command_line_asks_for_routers_that_there_are_and_for_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_of("eval.ray_serve", "about", list(ROUTERS))
    wanted = parser.parse_args(["--out", "o", "--seeds", "2", "--first-seed", "3", "--routers", f"round_robin,{OURS}"])
    assert (wanted.routers, seeds_of(wanted)) == (["round_robin", OURS], [3, 4])
    assert parser.parse_args(["--out", "o"]).routers == list(ROUTERS)
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", "o", "--routers", "power_of_too"])
    assert "there is no power_of_too; there are power_of_two, " in capsys.readouterr().err


def test_only_the_router_differs_in_the_config() -> None:
    apps = {name: config(name, Path("truth.json"), time_scale=4.0, log_dir=Path("log")) for name in ROUTERS}
    for app in apps.values():
        [model] = app["deployments"]
        assert (model["num_replicas"], model["max_ongoing_requests"]) == (4, 4)
        assert app["args"] == apps[OURS]["args"]
    assert "request_router_config" not in apps["power_of_two"]["deployments"][0]

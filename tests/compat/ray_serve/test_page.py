"""docs/ray.md says what is so."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from swarmx.compat import ray_serve
from swarmx.compat.ray_serve.options import RouterOptions, read_options
from swarmx.compat.ray_serve.planner import PlannerOptions, read_planner_options

PAGE = (Path(__file__).parents[3] / "docs" / "ray.md").read_text(encoding="utf-8")


def blocks() -> list[Any]:
    found = re.findall(r"^( *)```yaml\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(text) for _, text in found]


def test_the_config_of_the_page_is_accepted() -> None:
    app, scaling = blocks()
    [deployment] = app["applications"][0]["deployments"]
    router = deployment["request_router_config"]
    assert read_options(router["request_router_kwargs"]).retries == 3
    policy = scaling["autoscaling_config"]["policy"]
    assert read_planner_options(policy["policy_kwargs"]).start_s == 40.0
    for path in (router["request_router_class"], policy["policy_function"]):
        module, name = path.split(":")
        assert module == ray_serve.__name__
        assert name in ray_serve._WHERE


def test_every_option_is_on_the_page() -> None:
    for name in (*RouterOptions.__struct_fields__, *PlannerOptions.__struct_fields__):
        assert f"`{name}`" in PAGE, name


def test_what_is_named_in_the_package_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="Router"):
        ray_serve.NoSuchThing  # noqa: B018

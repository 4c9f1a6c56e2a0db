"""docs/ray.md says what is so of Ray as the engine, and its blocks run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from swarmx.compat import ray as compat_ray
from swarmx.compat.ray.options import RoutingOptions
from swarmx.config import parse
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.runtime.clock import WallClock
from swarmx.wiring.fleet import elastic_providers
from swarmx.wiring.ray_fleet import ray_provider
from swarmx.wiring.toolbox import tool_pools
from tests.e2e.fleet import Http
from tests.providers.ray.conftest import HAS_RAY, NO_RAY, ROOT, Nodes

PAGE = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
ENGINE = PAGE.split("## Ray as the engine")[1].split("\n## Tests")[0]


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", ENGINE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def settings_on(address: str | None) -> dict[str, object]:
    return {**tomllib.loads(block("toml")), "ray": {"address": address}}


def test_the_settings_of_the_page_put_all_that_is_elastic_on_ray() -> None:
    settings = parse(settings_on("ray://auto"))
    made = ray_provider(settings, clock=WallClock(), post=print, on_lost=print)
    assert made is not None
    assert elastic_providers(settings, None, tool_pools(settings, Path()), Path(), made) == {"emulated": made}
    assert settings.elastic[0].labels == {"place": "a"}


def test_without_an_address_nothing_is_on_ray() -> None:
    assert ray_provider(parse(settings_on(None)), clock=WallClock(), post=print, on_lost=print) is None


@pytest.mark.parametrize(("device", "bounded"), [("cpu", True), ("h100", False)])
def test_a_vllm_on_a_cpu_is_told_how_much_of_its_node_it_may_take(device: str, bounded: bool) -> None:
    entry = {"provider": "process", "model": "m", "folder": "models/m", "device": device, "resources": {"CPU": 3.0}}
    settings = parse({"elastic": [entry], "ray": {"address": "ray://auto"}})
    made = ray_provider(settings, clock=WallClock(), post=print, on_lost=print)
    assert made is not None
    engine = made._groups[f"m-{device}"].engine
    assert engine.argv[:2] == ("vllm", "serve")
    assert ("--max-model-len" in engine.argv) == bounded
    assert (engine.env.get("VLLM_CPU_KVCACHE_SPACE"), engine.env.get("OMP_NUM_THREADS")) == (
        ("1", "3") if bounded else (None, None)
    )


def test_an_address_that_is_none_is_refused_with_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"ray\.address: .*ray://auto"):
        parse(settings_on("moon"))


def test_every_keyword_of_routed_is_on_the_page() -> None:
    for name in RoutingOptions.__dataclass_fields__:
        assert f"`{name}`" in ENGINE, name


def test_what_is_named_in_the_package_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="routed"):
        compat_ray.NoSuchThing  # noqa: B018


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed here")
@pytest.mark.process
async def test_where_ray_is_not_installed_the_error_says_what_to_do() -> None:
    made = ray_provider(parse(settings_on("ray://auto")), clock=WallClock(), post=print, on_lost=print)
    assert made is not None
    with pytest.raises(ReplicaError, match=r"no link to Ray: .*pip install 'swarmx\[ray\]'"):
        await made.start()
    await made.stop()


@pytest.mark.skipif(not HAS_RAY, reason=NO_RAY)
@pytest.mark.process
@pytest.mark.timeout(600)
def test_the_program_of_the_page_runs(nodes: Nodes) -> None:
    env = {**os.environ, "RAY_ADDRESS": nodes.address, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", block("python")], env=env, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "SwarmX did not" not in run.stderr


@pytest.mark.skipif(not HAS_RAY, reason=NO_RAY)
@pytest.mark.process
@pytest.mark.timeout(600)
async def test_the_command_of_the_page_serves_from_ray(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("a")  # the first one may have been drained
    (tmp_path / "swarmx.toml").write_text(block("toml") + '\n[ray]\nnamespace = "page"\n')
    command = block("bash").strip().replace("ray://auto", nodes.address).split()
    assert command[:2] == ["swarmx", "up"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarmx", *command[1:], "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        url = json.loads(await process.stdout.readline())["url"]
        async with Http(url, (tmp_path / ".swarmx" / "admin.token").read_text()) as client:
            body = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
            async with asyncio.timeout(300.0):
                while (await client.post("/v1/chat/completions", json=body)).status != 200:
                    await asyncio.sleep(0.5)
    finally:
        process.terminate()
        assert await process.wait() == 0

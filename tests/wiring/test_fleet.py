"""From settings to groups, profiles and providers."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from swarmx.config import parse
from swarmx.core.engine import profiles
from swarmx.core.errors import ConfigError
from swarmx.providers.static import static_replica
from swarmx.runtime.clock import WallClock
from swarmx.wiring.fleet import elastic_providers, emulated_provider, fixed_providers, groups
from swarmx.wiring.ray_fleet import ray_provider
from swarmx.wiring.toolbox import tool_pools

NO_TOOLS = tool_pools(parse({}), Path("logs"))
ELASTIC = {"model": "qwen3-8b", "device": "l40s", "slots": 8, "min": 1, "max": 2, "limit": 6, "start_s": 40.0}


def test_an_emulated_group_is_given_in_wall_seconds_and_with_its_slots() -> None:
    (group,) = groups(parse({"emulation": {"time_scale": 10.0}, "elastic": [ELASTIC]}))
    real = profiles()["qwen3-8b", "l40s"]
    assert group.start_s == 4.0
    assert group.profile.max_batch == 8
    assert group.profile.step_base_s == pytest.approx(real.step_base_s / 10.0)
    assert (group.min_replicas, group.max_replicas, group.limit) == (1, 2, 6)


def test_a_group_that_is_not_profiled_is_an_error_that_names_what_is() -> None:
    with pytest.raises(ConfigError, match=r"no profile of 'qwen3-8b' on 'toaster'; qwen3-8b is profiled on .*l40s"):
        groups(parse({"elastic": [{**ELASTIC, "device": "toaster"}]}))


def test_a_group_of_images_must_say_so() -> None:
    with pytest.raises(ConfigError, match="serves images"):
        groups(parse({"elastic": [{"model": "sdxl", "device": "l40s"}]}))


def test_nothing_is_emulated_that_nobody_asked_for() -> None:
    settings = parse({"replicas": [{"id": "a", "model": "m", "url": "http://127.0.0.1:1"}]})
    emulated = emulated_provider(settings)
    assert emulated is None
    assert len(fixed_providers(settings, emulated, NO_TOOLS)) == 1
    assert elastic_providers(settings, emulated, NO_TOOLS, Path("logs")) == {}


def test_one_emulator_serves_fixed_and_elastic_replicas() -> None:
    settings = parse({"emulated": [{"model": "qwen3-8b", "device": "h100"}], "elastic": [ELASTIC]})
    emulated = emulated_provider(settings)
    assert emulated is not None
    assert elastic_providers(settings, emulated, NO_TOOLS, Path("logs")) == {"emulated": emulated}


async def test_a_server_of_somebody_else_is_sent_priorities_only_where_the_settings_say_so() -> None:
    url = "http://127.0.0.1:1"
    asked = [{"id": "plain", "model": "m", "url": url}, {"id": "sglang", "model": "m", "url": url}]
    asked[1]["priorities"] = "high_first"
    (provider,) = fixed_providers(parse({"replicas": asked}), None, NO_TOOLS)
    assert [replica.priorities for replica in await provider.start()] == ["ignored", "high_first"]


def test_replicas_that_are_started_here_get_the_order_of_their_entry() -> None:
    entry = {"model": "qwen3-8b", "device": "h100", "engine_order": "priority"}
    assert [group.engine_order for group in groups(parse({"elastic": [entry, ELASTIC]}))] == ["priority", "arrival"]


@pytest.mark.parametrize("place", ["emulated", "elastic", "replicas"])
def test_servers_of_images_know_no_priorities(place: str) -> None:
    entry: dict[str, str] = {"model": "sdxl", "device": "h100", "kind": "image"}
    more = (
        {"id": "i", "url": "http://h", "priorities": "low_first"}
        if place == "replicas"
        else {"engine_order": "priority"}
    )
    with pytest.raises(ConfigError, match="servers of images"):
        parse({place: [{**entry, **more}]})


def test_a_process_group_without_a_model_in_its_folder_is_an_error(tmp_path: Path) -> None:
    settings = parse({"elastic": [{"model": "m", "device": "cpu", "provider": "process", "folder": str(tmp_path)}]})
    with pytest.raises(ConfigError, match="holds no model"):
        elastic_providers(settings, None, NO_TOOLS, Path("logs"))


ON_GPUS = {"model": "m", "device": "h100", "provider": "process", "slots": 32}


def test_a_process_group_on_gpus_is_as_fast_as_an_unknown_replica_until_it_is_profiled() -> None:
    asked = [{**ON_GPUS, "folder": "f"}, {**ON_GPUS, "folder": "f", "model": "qwen3-8b"}]
    unknown, known = groups(parse({"elastic": asked}))
    static = static_replica(replica_id="r", model="m", kind="llm", device="h100", url="http://h")
    assert unknown.profile == msgspec.structs.replace(static.profile, max_batch=32)
    assert known.profile == msgspec.structs.replace(profiles()["qwen3-8b", "h100"], max_batch=32)


def test_a_process_group_on_gpus_asks_for_a_vllm_and_for_such_a_gpu_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    entry = {**ON_GPUS, "folder": str(tmp_path)}
    with pytest.raises(ConfigError, match="no-such-vllm is neither"):
        elastic_providers(parse({"elastic": [{**entry, "command": "no-such-vllm"}]}), None, NO_TOOLS, tmp_path)
    elsewhere = parse({"elastic": [{**entry, "command": sys.executable, "device": "no-such-gpu"}]})
    with pytest.raises(ConfigError, match=r"device = 'no-such-gpu' (asks for a GPU\. NVML|names no GPU)"):
        elastic_providers(elsewhere, None, NO_TOOLS, tmp_path)


def test_a_vllm_on_gpus_of_ray_is_called_as_here() -> None:
    entry = {**ON_GPUS, "folder": "models/m", "command": "/opt/vllm", "options": ["--seed=1"], "max_model_len": 4096}
    settings = parse({"elastic": [entry], "ray": {"address": "ray://auto"}})
    made = ray_provider(settings, clock=WallClock(), post=print, on_lost=print)
    assert made is not None
    folder = str(Path("models/m").absolute())
    assert made._groups["m-h100"].engine.argv == (
        *("/opt/vllm", "serve", folder, "--served-model-name", "m", "--host", "127.0.0.1", "--port", "{port}"),
        *("--gpu-memory-utilization", "0.9", "--tensor-parallel-size", "1", "--max-model-len", "4096"),
        *("--max-num-seqs", "32", "--seed=1"),
    )


COMFY = {"model": "m", "device": "cpu", "provider": "comfyui", "folder": "none", "graph": "graph.json"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({**COMFY, "graph": None}, "needs folder"),
        ({**COMFY, "kind": "llm"}, "serves images"),
        ({**COMFY, "slots": 2}, "serves images"),
        ({"model": "m", "device": "cpu", "options": ["--cpu"]}, "are for provider"),
    ],
)
def test_a_group_of_comfyui_that_cannot_be_is_an_error(entry: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse({"elastic": [entry]})


def test_a_group_of_comfyui_without_a_checkout_is_an_error_and_serves_one_image_at_a_time() -> None:
    settings = parse({"elastic": [COMFY]})
    (group,) = groups(settings)
    assert (group.kind, group.profile.max_batch, group.start_s) == ("image", 1, 30.0)
    with pytest.raises(ConfigError, match="holds no ComfyUI"):
        elastic_providers(settings, None, NO_TOOLS, Path("logs"))

"""Settings are strict: what is unknown or out of range is named, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from swarmx.agents.policies import POLICIES
from swarmx.agents.router_settings import TenantSettings
from swarmx.config import EmulatedReplicas, Settings, is_loopback, load, parse, rows
from swarmx.core.errors import ConfigError

A = {"id": "a", "model": "m", "url": "http://127.0.0.1:1"}
ON_GPUS = {"model": "m", "device": "h100", "provider": "process", "folder": "f"}


def complaint(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(data, source="x.toml")
    assert all(line.startswith("x.toml: ") for line in str(caught.value).splitlines())
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "name", "nearest"),
    [
        ({"sever": {}}, "sever", "server"),
        ({"server": {"prot": 1}}, "server.prot", "port"),
        ({"router": {"polcy": "random"}}, "router.polcy", "policy"),
        ({"replicas": [{**A, "modle": "m"}]}, "replicas.0.modle", "model"),
        ({"emulated": [{"model": "m", "device": "d", "cuont": 1}]}, "emulated.0.cuont", "count"),
        ({"workflows": {"idle_s": 1.0}}, "workflows.idle_s", "transparent_idle_s"),
        ({"tenants": {"acme": {"wieght": 1.0}}}, "tenants.acme.wieght", "weight"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_one(data: dict[str, Any], name: str, nearest: str) -> None:
    said = complaint(data)
    assert f"unknown setting {name}." in said
    assert nearest in said


def test_a_setting_like_no_other_is_told_all_that_there_are() -> None:
    assert "Known here: every_s, timeout_s, failures." in complaint({"watch": {"zzz": 1}})


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"server": {"port": 65536}}, "server.port"),
        ({"server": {"port": "http"}}, "server.port"),
        ({"server": {"max_body_bytes": 10}}, "server.max_body_bytes"),
        ({"server": {"drain_s": -1}}, "server.drain_s"),
        ({"router": {"max_attempts": 0}}, "router.max_attempts"),
        ({"router": {"call_timeout_s": 0.0}}, "router.call_timeout_s"),
        ({"router": {"call_timeout_s": float("inf")}}, "router.call_timeout_s"),
        ({"router": {"queue_timeout_s": float("nan")}}, "router.queue_timeout_s"),
        ({"router": {"parameters": {"x": float("nan")}}}, "router.parameters.x"),
        ({"watch": {"every_s": -1.0}}, "watch.every_s"),
        ({"emulation": {"time_scale": 0.0}}, "emulation.time_scale"),
        ({"replicas": [{**A, "url": "127.0.0.1:1"}]}, "replicas.0.url"),
        ({"replicas": [{**A, "id": "a b"}]}, "replicas.0.id"),
        ({"replicas": [{**A, "kind": "video"}]}, "replicas.0.kind"),
        ({"replicas": [{"id": "a", "url": "http://x"}]}, "replicas.0.model is missing"),
        ({"emulated": [{"model": "m", "device": "d", "count": 65}]}, "emulated.0.count"),
        ({"emulated": [{"model": "m", "device": "d", "size_class": "9b"}]}, "emulated.0.size_class"),
        ({"tenants": {"acme": {"weight": 0.0}}}, "tenants.acme.weight"),
        ({"tenants": {"acme": {"weight": float("nan")}}}, "tenants.acme.weight"),
        ({"tenants": {"acme": {"tokens_per_minute": 0}}}, "tenants.acme.tokens_per_minute"),
        ({"tenants": {"acme": {"priority": 11}}}, "tenants.acme.priority"),
        ({"tenants": {"a b": {}}}, "tenants.a b"),
        ({"router": {"max_waiting": 0}}, "router.max_waiting"),
        ({"router": {"priority_age_s": 0.0}}, "router.priority_age_s"),
        ({"server": 5}, "server"),
        ({"replicas": {}}, "replicas"),
    ],
)
def test_a_value_out_of_range_is_named(data: dict[str, Any], name: str) -> None:
    assert f"x.toml: {name}" in complaint(data)


def test_every_problem_has_a_line_of_its_own() -> None:
    assert len(complaint({"server": {"port": -1, "hots": ""}, "wach": {}}).splitlines()) == 3


def test_a_long_value_is_not_repeated_in_full() -> None:
    assert len(complaint({"server": {"port": "x" * 10_000}})) < 300


def test_an_unknown_policy_is_named_with_the_nearest_one() -> None:
    assert "Did you mean 'round_robin'?" in complaint({"router": {"policy": "round_robbin"}})


def test_a_parameter_that_the_policy_does_not_have_is_named() -> None:
    said = complaint({"router": {"policy": "random", "parameters": {"speed": 1.0}}})
    assert "'random' has no parameter 'speed'" in said


@pytest.mark.parametrize(
    "data",
    [
        {"replicas": [A, A]},
        {"emulated": [{"model": "a", "device": "b"}] * 2},
        {"replicas": [{**A, "id": "m-d-0"}], "emulated": [{"model": "m", "device": "d"}]},
    ],
)
def test_replica_ids_are_unique(data: dict[str, Any]) -> None:
    assert "occurs more than once" in complaint(data)


def test_a_model_has_one_kind() -> None:
    said = complaint({"replicas": [A], "emulated": [{"model": "m", "device": "d", "kind": "image"}]})
    assert "a model has one kind, m is given both" in said


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the settings .*no\.toml: No such file"):
        load(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("raw", [b"[server\nport = 1", b"port =", b"\xff\xfe", b"[server]\nport = 1\nport = 2\n"])
def test_a_file_that_is_not_toml_is_said_to_be_so(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        load(path)


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "good.toml"
    path.write_text('[server]\nport = 0\n[[replicas]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1"\n')
    settings = load(path)
    assert settings.server.port == 0
    assert settings.server.host == Settings().server.host
    assert [replica.id for replica in settings.replicas] == ["a"]


def test_no_file_means_all_defaults() -> None:
    assert load(None) == parse({}) == Settings()


def test_every_setting_has_a_meaning_and_is_listed_once() -> None:
    listed = list(rows(Settings()))
    for name, _, meaning in listed:
        assert meaning.strip().endswith("."), name
    names = [name for name, _, _ in listed]
    assert len(set(names)) == len(names)
    assert {"server.port", "router.policy", "replicas[].url", "emulated[].device"} <= set(names)


def test_every_section_says_what_it_is_for() -> None:
    for section, info in Settings.model_fields.items():
        kinds = getattr(info.annotation, "__args__", (info.annotation,))
        (model,) = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        assert (model.__doc__ or "").strip(), section


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().server.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_set(policy: str) -> None:
    assert parse({"router": {"policy": policy}}).router.settings([], {}).policy == policy


def test_the_router_takes_every_one_of_its_settings() -> None:
    given = {"max_attempts": 2, "queue_timeout_s": 1.5, "seed": 4, "breaker_failures": 9, "breaker_open_s": 2.0}
    made = parse({"router": given}).router.settings([], {})
    assert {name: getattr(made, name) for name in given} == given


def test_the_router_hears_of_the_tenants() -> None:
    found = parse({"tenants": {"acme": {"weight": 2.0, "tokens_per_minute": 600}, "b": {"priority": 5}}})
    tenants = found.router.settings([], found.tenants).tenants
    assert tenants == {"acme": TenantSettings(weight=2.0, tokens_per_minute=600.0), "b": TenantSettings(priority=5)}


def test_emulated_replicas_are_numbered() -> None:
    assert EmulatedReplicas(model="m", device="d", count=2).ids() == ["m-d-0", "m-d-1"]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),  # noqa: S104
     ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_only_loopback_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"elastic": [{"model": "m", "device": "d", "max": 9}]}, "min <= max <= limit"),
        ({"elastic": [{"model": "m", "device": "d", "provider": "process"}]}, "needs folder"),
        (
            {"elastic": [{"model": "m", "device": "cpu", "provider": "process", "folder": "f", "slots": 2}]},
            "leave slots",
        ),
        ({"elastic": [{**ON_GPUS, "kind": "image"}]}, "serves text"),
        ({"elastic": [{**ON_GPUS, "options": ["--port", "1"]}]}, "options: --port: SwarmX sets --port itself"),
        ({"elastic": [{**ON_GPUS, "gpu_memory_utilization": 1.1}]}, "gpu_memory_utilization"),
        ({"elastic": [{**ON_GPUS, "device": "cpu", "tensor_parallel_size": 2}]}, "tensor_parallel_size: for provider"),
        ({"elastic": [{**ON_GPUS, "device": "cpu", "options": ["--seed=1"]}]}, 'and for "process" on GPUs'),
        ({"elastic": [{"model": "m", "device": "d", "max_model_len": 1}]}, "max_model_len: for provider"),
        ({"elastic": [{"model": "m", "device": "d"}, {"model": "m", "device": "d"}]}, "named twice"),
        ({"elastic": [{"model": "m", "device": "d"}], "emulated": [{"model": "m", "device": "d"}]}, "named twice"),
        ({"elastic": [{"model": "m", "device": "d", "start_s": 150.0}]}, "queue_timeout_s is 150"),
        ({"elastic": [{"model": "m", "provider": "tools"}]}, "needs file"),
        ({"elastic": [{"model": "m", "device": "d", "file": "f"}]}, "others have none"),
        ({"elastic": [{"model": "m", "device": "d", "kind": "tool"}]}, 'goes with provider = "tools"'),
        ({"elastic": [{"model": "m", "provider": "tools", "file": "f", "device": "h100"}]}, "device cpu"),
        ({"elastic": [{"model": "m", "provider": "tools", "file": "f", "min": 0}]}, "min = 1 at least"),
        ({"tools": [{}]}, "give either file"),
        ({"tools": [{"file": "f", "url": "http://h"}]}, "give either file"),
        ({"tools": [{"url": "http://h", "id": "a", "pool": "p"}]}, "needs id, pool and token_variable"),
        ({"tools": [{"file": "f", "cuont": 2}]}, "Did you mean 'count'?"),
        (
            {
                "replicas": [{"id": "a", "model": "m", "url": "http://h"}],
                "tools": [{"id": "a", "url": "http://h", "pool": "p", "token_variable": "T"}],
            },
            "a occurs more than once",
        ),
        ({"scaler": {"policy": "target_trackin"}}, "Did you mean 'target_tracking'?"),
        ({"scaler": {"parameters": {"target_in_flight": -1.0}}}, "target_in_flight"),
        ({"guard": {"cooldown_s": {"scale_model": -1.0}}}, "cooldown of scale_model"),
        ({"coordinator": {"engine": "openai"}}, "needs url"),
        ({"coordinator": {"mode": "yolo"}}, "coordinator.mode"),
        ({"coordinator": {"modes": {"scale_model": "yolo"}}}, "coordinator.modes.scale_model"),
    ],
)
def test_settings_of_the_control_plane_that_cannot_work_are_refused(given: dict[str, Any], said: str) -> None:
    assert said in complaint(given)


def test_an_emulated_group_starts_in_emulated_seconds() -> None:
    quick = {"emulation": {"time_scale": 10.0}, "elastic": [{"model": "m", "device": "d", "start_s": 1000.0}]}
    assert parse(quick).elastic[0].group_id == "m-d"

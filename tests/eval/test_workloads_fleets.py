"""Fleets and how busy a workload would keep them."""

from __future__ import annotations

import msgspec
import pytest

from eval.workloads.draft import LARGE, SMALL
from eval.workloads.fleets import CPU_FAST, CPU_SLOW, FLEETS, Row, fleet, made, profile_of, sized
from eval.workloads.load import busiest, offered_load, rate_for
from eval.workloads.toy import toy
from swarmx.core.errors import ConfigError


@pytest.mark.parametrize("name", list(FLEETS))
def test_every_fleet_has_a_profile_for_each_replica_and_names_of_its_own(name: str) -> None:
    replicas = fleet(name)
    assert len(replicas) == {"heterogeneous": 65, "homogeneous": 45, "one_model": 24, "kv_tight": 65}[name]
    assert len({replica.replica_id for replica in replicas}) == len(replicas)
    for replica in replicas:
        assert (replica.profile.model, replica.profile.device) == (replica.model, replica.device)
        assert (replica.kind == "image") == (replica.profile.max_batch == 1)


def test_language_models_run_on_three_kinds_of_devices_or_on_one() -> None:
    replicas = [r.device for r in fleet("heterogeneous", 10.0) if r.model == SMALL]
    shares = {device: replicas.count(device) / len(replicas) for device in set(replicas)}
    assert shares == pytest.approx({"h100": 4 / 11, "a100": 2 / 11, "l40s": 5 / 11})
    assert {r.device for r in fleet("homogeneous") if r.kind == "llm"} == {"h100"}


@pytest.mark.parametrize("replicas", [100, 1000, 10_000])
def test_a_fleet_scales_to_about_so_many_replicas(replicas: int) -> None:
    assert len(sized("heterogeneous", replicas)) == pytest.approx(replicas, rel=0.04)
    assert {r.model for r in fleet("heterogeneous", 0.01)} == {r.model for r in fleet("heterogeneous")}


def test_unknown_fleets_models_and_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="no fleet 'huge', expected one of heterogeneous"):
        fleet("huge")
    with pytest.raises(ConfigError, match=r"no profile of llama-3.1-8b on tpu; it has .*h100"):
        made([Row(SMALL, "tpu", 1)])
    with pytest.raises(ConfigError, match=r"no profile of gpt-9 on h100; the models are .*sdxl"):
        made([Row("gpt-9", "h100", 1)])
    with pytest.raises(ConfigError, match=r"-1\.0 times as large"):
        fleet("homogeneous", -1.0)


def test_a_slow_processor_takes_longer_for_the_same_task() -> None:
    assert profile_of("cpu-ocr", CPU_SLOW).step_base_s > profile_of("cpu-ocr", CPU_FAST).step_base_s


def test_load_grows_with_the_rate_and_shrinks_with_the_fleet() -> None:
    workload = toy(150, 2.0, 0)
    loads = offered_load(workload, fleet("heterogeneous"))
    assert all(load > 0.0 for load in loads.values())
    assert offered_load(workload, fleet("heterogeneous"), 4.0) == pytest.approx({m: 2 * v for m, v in loads.items()})
    assert offered_load(workload, fleet("heterogeneous", 2.0)) == pytest.approx({m: v / 2 for m, v in loads.items()})
    rate = rate_for(workload, fleet("heterogeneous"), 0.8)
    assert busiest(offered_load(workload, fleet("heterogeneous"), rate))[1] == pytest.approx(0.8)


def test_a_serial_pool_is_as_busy_as_its_work_takes() -> None:
    workload = toy(100, 1.0, 0, ("pools",))
    work = [call.work for w in workload.workflows for call in w.calls if call.model == "cpu-ocr"]
    expected = sum(0.005 + 0.010 * each for each in work) / 100.0 / 4.0
    replicas = made([Row("cpu-ocr", CPU_FAST, 4), Row("cpu-general", CPU_FAST, 1)])
    assert offered_load(workload, replicas)["cpu-ocr"] == pytest.approx(expected)


def test_a_prefix_that_was_seen_is_not_counted_again() -> None:
    workload = toy(60, 1.0, 0, ("sessions",))
    nothing_shared = msgspec.structs.replace(
        workload,
        workflows=[
            msgspec.structs.replace(w, calls=tuple(msgspec.structs.replace(c, blocks=()) for c in w.calls))
            for w in workload.workflows
        ],
    )
    replicas = fleet("one_model")
    assert offered_load(nothing_shared, replicas)[SMALL] > 1.1 * offered_load(workload, replicas)[SMALL]


def test_a_model_that_nobody_serves_is_an_error() -> None:
    with pytest.raises(ConfigError, match=f"no replica of {LARGE}"):
        offered_load(toy(20, 1.0, 0, ("coding",)), fleet("one_model"))


def test_the_tight_fleet_is_the_heterogeneous_one_with_less_memory_for_language_models() -> None:
    for tight, roomy in zip(fleet("kv_tight"), fleet("heterogeneous"), strict=True):
        tokens = 24_576 if tight.model in (SMALL, LARGE) else roomy.profile.kv_capacity_tokens
        assert tight == msgspec.structs.replace(
            roomy, profile=msgspec.structs.replace(roomy.profile, kv_capacity_tokens=tokens)
        )

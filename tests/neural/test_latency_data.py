from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

from swarmx.core.errors import PredictorError
from swarmx.neural.heads.images import IMAGE
from swarmx.neural.heads.latency import COMPLETION, TTFT
from swarmx.neural.splits import split_of
from swarmx.neural.training import images, latency
from swarmx.neural.training.latency_data import candidate_of, forgetful, observations


def write_requests(folder: Path, *, timeline: bool = True) -> None:
    """Two runs of three calls each, one a second; every call takes four seconds, and its first token one."""
    runs = [100] * 3 + [1000] * 3
    arrive = [0.0, 1.0, 2.0] * 2
    pl.DataFrame(
        {
            "run": runs, "req": [0, 1, 2] * 2, "prompt_tokens": [100, 200, 300] * 2,
            "out_chars_incl_prompt": [320 + 440, 640 + 440, 960 + 440] * 2, "ttft_s": [1.5] * 6, "e2e_s": [4.0] * 6,
            "arrive_s": arrive, "finish_s": [a + 4.0 for a in arrive], "running_at_arrival": [None, 1.0, 2.0] * 2,
            "pending_at_arrival": [None, 0.0, 1.0] * 2, "kv_usage_pct_at_arrival": [None, 5.0, 10.0] * 2,
        }
    ).write_parquet(folder / "measured_requests_vllm_state.parquet")  # fmt: skip
    if timeline:
        pl.DataFrame(
            {
                "run": [100] * 3, "t_s": [0.1, 0.6, 1.1], "num_running": [7, 8, 9], "num_pending": [0, 1, 2],
                "gpu_kvcache_usage": [1.0, 2.0, 3.0],
            }
        ).write_parquet(folder / "measured_timeline_vllm_state.parquet")  # fmt: skip


def write_silicon(folder: Path, rows: int = 120) -> None:
    shared = {
        "backend": "vllm",
        "model_path": "meta-llama/Llama-3.1-8B-Instruct",
        "system": "h100_sxm",
        "precision": "fp8",
        "mode": "agg",
    }
    sizes = {"batch_size": None, "tp_size": 1.0, "pp_size": 1.0, "attention_dp_size": None}
    pl.DataFrame(
        [
            {**shared, **sizes, "isl": 100 + i, "osl": 50, "concurrency": 4.0, "ttft_ms": 100.0 + i, "tpot_ms": 10.0}
            for i in range(rows)
        ]
        + [
            {
                **shared,
                **sizes,
                "mode": "disagg",
                "isl": 1,
                "osl": 1,
                "concurrency": 1.0,
                "ttft_ms": 1.0,
                "tpot_ms": 1.0,
            }
        ]
        + [{**shared, **sizes, "isl": 1, "osl": 1, "concurrency": 1.0, "ttft_ms": 0.0, "tpot_ms": 1.0}],
        schema_overrides={"batch_size": pl.Float32, "attention_dp_size": pl.Float32},
    ).write_parquet(folder / "measured_ttft_tpot_silicon.parquet")


def write_argonne(folder: Path) -> None:
    pl.DataFrame(
        {
            "gpu": ["Nvidia A100 GPU"], "n_gpus": [2], "framework": ["TensorRT-LLM"],
            "model": ["meta-llama/Llama-2-7b-hf"], "batch": [16], "latency_s": [9.0], "throughput_tok_s": [1.0],
            "input_tokens": [128], "output_tokens": [256],
        }
    ).write_parquet(folder / "measured_e2e_argonne.parquet")  # fmt: skip


def test_a_folder_without_tables_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="holds none of the latency tables measured_requests_vllm_state"):
        observations(tmp_path)


def test_a_table_without_a_column_names_it(tmp_path: Path) -> None:
    pl.DataFrame({"gpu": ["x"]}).write_parquet(tmp_path / "measured_e2e_argonne.parquet")
    with pytest.raises(PredictorError, match="has no column n_gpus"):
        observations(tmp_path)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "measured_e2e_argonne.parquet").write_bytes(b"not parquet")
    with pytest.raises(PredictorError, match="cannot be read as a table"):
        observations(tmp_path)


def test_the_state_at_arrival_is_counted_from_the_runs_own_clock(tmp_path: Path) -> None:
    write_requests(tmp_path)
    _, second, third = observations(tmp_path)[:3]
    assert (second.in_flight, third.in_flight) == (1.0, 2.0)
    assert third.output_tokens == 100.0
    # The first has been answering for half a second of two and a half, the second not yet.
    assert third.context_tokens == pytest.approx(100 + 200 + 100 * 0.5 / 2.5)
    assert third.prefill_tokens == 200.0
    assert third.remaining_work == pytest.approx(100 + 80)


def test_signals_of_some_rows_are_a_second_old(tmp_path: Path) -> None:
    write_requests(tmp_path)
    first, second, third = observations(tmp_path)[:3]
    assert np.isnan(first.running)
    assert (second.running, second.kv_usage, second.signal_age_s) == (1.0, 0.05, 0.25)
    assert (third.running, third.waiting, third.signal_age_s) == (8.0, 1.0, pytest.approx(1.4))


def test_without_a_timeline_the_signal_is_the_one_at_arrival(tmp_path: Path) -> None:
    write_requests(tmp_path, timeline=False)
    assert observations(tmp_path)[2].running == 2.0


def test_whole_runs_are_held_out(tmp_path: Path) -> None:
    write_requests(tmp_path)
    found = observations(tmp_path)
    assert split_of("row", "run:1000") == "test"
    assert {o.unseen for o in found if o.split == "test"} == {"run"}
    assert [o.split == "test" for o in found] == [False] * 3 + [True] * 3


def test_only_aggregated_settings_that_were_measured_are_read(tmp_path: Path) -> None:
    write_silicon(tmp_path)
    found = observations(tmp_path)
    assert len(found) == 120
    assert found[0].completion_s == pytest.approx(0.1 + 0.01 * 49)
    assert (found[0].in_flight, found[0].remaining_work) == (3.0, 75.0)
    assert found[0].averaged
    assert {o.split for o in found} == {"train", "validation", "test"}


def test_a_batch_that_begins_together_finds_every_prompt_unanswered(tmp_path: Path) -> None:
    write_argonne(tmp_path)
    (found,) = observations(tmp_path)
    assert (found.device, found.model, found.candidate.engine) == ("a100", "llama-2-7b", "trtllm")
    assert (found.waiting, found.prefill_tokens, found.completion_s) == (15.0, 15 * 128.0, 9.0)
    assert np.isnan(found.ttft_s)


def test_each_head_gets_the_rows_that_measured_its_quantity(tmp_path: Path) -> None:
    write_silicon(tmp_path)
    write_argonne(tmp_path)
    tables = latency.tables(tmp_path)
    assert tables["completion"].features.shape[1] == len(COMPLETION.features)
    assert tables["ttft"].features.shape[1] == len(TTFT.features)
    assert len(tables["completion"]) > len(tables["ttft"]) >= 120
    assert set(tables["ttft"].group.tolist()) == {"mean"}
    assert np.isfinite(tables["ttft"].anchor).all()


def test_what_is_forgotten_is_nan_and_no_test_row_is_repeated(tmp_path: Path) -> None:
    write_silicon(tmp_path)
    found = observations(tmp_path)
    both = latency.with_gaps(found)
    assert len(both) > len(found)
    assert sum(o.split == "test" for o in both) == sum(o.split == "test" for o in found)
    blind = forgetful(found[0], device=True, model=False, state=True)
    assert np.isnan(blind.candidate.device.tflops)
    assert blind.candidate.model == found[0].candidate.model


def test_the_shipped_profile_serves_where_it_was_fitted() -> None:
    shipped = candidate_of("meta-llama/Llama-3.1-8B", "h100", engine="vllm", tensor_parallel=1.0)
    other = candidate_of("meta-llama/Llama-3.1-8B", "h100", engine="vllm", tensor_parallel=4.0)
    assert (shipped.profile.model, other.profile.model) == ("llama-3.1-8b", "roofline")


def write_flows(folder: Path) -> None:
    gpus, flows = ("H100", "A100", "L40S", "RTX3090", "M2_Max"), [f"flow{i}" for i in range(8)] + ["flux1_dev"]
    rows = [
        {
            "date": "2025-01-01", "gpu": gpu, "flow": flow, "test_case": "20steps", "weights_unloaded": cold,
            "exec_s": (1.0 + g) * (1.0 + f) * (2.0 if cold else 1.0),
        }
        for g, gpu in enumerate(gpus)
        for f, flow in enumerate(flows)
        for cold in (False, True)
    ]  # fmt: skip
    pl.DataFrame(rows).write_parquet(folder / "measured_comfyui_flows.parquet")
    pl.DataFrame(
        {
            "flow": ["flux1_dev"], "n_nodes": [12], "n_edges": [14], "steps": ["[4, 6]"],
            "classes": ["UNETLoader,KSampler,VAEDecode"],
        }
    ).write_csv(folder / "comfyui_flow_graphs.csv")  # fmt: skip


def test_flows_become_jobs_by_their_case_their_classes_and_their_name(tmp_path: Path) -> None:
    write_flows(tmp_path)
    found = images.runs(tmp_path)
    known = next(r for r in found if r.flow == "flux1_dev")
    unknown = next(r for r in found if r.flow == "flow3")
    assert (known.job.steps, known.job.samplers, known.job.model_b, known.job.nodes) == (20.0, 2, 12.0, 12.0)
    assert np.isnan(unknown.job.nodes)
    assert {r.device for r in found} == {"h100", "a100", "l40s", "rtx-3090", "m2-max"}


def test_a_test_row_knows_its_flow_from_other_devices_only(tmp_path: Path) -> None:
    write_flows(tmp_path)
    found = images.runs(tmp_path)
    table = images.table(found)
    seen = table.features[:, IMAGE.features.index("log_graph_seen")]
    test = table.split == "test"
    assert test.sum() == sum(r.split == "test" for r in found)
    assert (seen[test] > 0.0).all()
    assert (table.features[~test][1::3, IMAGE.features.index("log_graph_seen")] == 0.0).all()
    worse = [msgspec.structs.replace(r, seconds=r.seconds * 9.0) if r.split == "test" else r for r in found]
    assert np.array_equal(images.table(worse).anchor[test], table.anchor[test])


def test_what_is_left_out_is_the_test_and_nothing_else(tmp_path: Path) -> None:
    write_flows(tmp_path)
    found = images.runs(tmp_path)
    made = images.leave_out(found, np.array([r.device == "l40s" for r in found]))
    assert {r.device for r in made if r.split == "test"} == {"l40s"}
    assert all(r.split == "test" for r in made if r.device == "l40s")

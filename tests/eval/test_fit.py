"""The fits recover known coefficients from synthetic tables and say what is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from eval.fit import engine, lengths

TRUE = {
    "step_base_s": 6e-3,
    "decode_seq_s": 2e-5,
    "decode_ctx_token_s": 4e-8,
    "prefill_token_s": 2e-5,
    "prefill_ctx_token_s": 5e-10,
}
DEVICE_FACTOR = {"H100": 1.0, "A100": 2.0, "L40S": 3.0}


def step_rows() -> pl.DataFrame:
    """A step table of one model on one device that follows TRUE without noise."""
    t, rows = TRUE, []
    for batch in (1, 4, 16, 64, 256):
        for context in (128, 512, 2048, 8192):
            seconds = t["step_base_s"] + batch * (t["decode_seq_s"] + context * t["decode_ctx_token_s"])
            rows.append(("decode", batch, context, seconds))
    for batch in (1, 4):
        for context in (64, 512, 2048, 8192):
            tokens, before = batch * context, batch * context**2 / 2
            seconds = t["step_base_s"] + tokens * t["prefill_token_s"] + before * t["prefill_ctx_token_s"]
            rows.append(("prefill", batch, context, seconds))
    for batch in (0, 8, 128):
        for chunk in (256, 1024, 4096):
            before = chunk * min(chunk, 2048) / 2
            seconds = t["step_base_s"] + batch * (t["decode_seq_s"] + 2048 * t["decode_ctx_token_s"])
            seconds += chunk * t["prefill_token_s"] + before * t["prefill_ctx_token_s"]
            rows.append(("mixed", batch, chunk, seconds))
    columns = {"model": "Qwen/Qwen3-8B", "system": "h100_sxm", "tp": 1}
    frame = pl.DataFrame(rows, schema=["kind", "batch", "context", "s"], orient="row")
    return frame.with_columns(latency_ms=pl.col("s") * 1e3, **{k: pl.lit(v) for k, v in columns.items()}).drop("s")


def flow_rows() -> pl.DataFrame:
    """Image runs with 0.5 s base and 0.1 s a step on the H100, times DEVICE_FACTOR elsewhere."""
    rows: list[tuple[Any, ...]] = []
    for gpu, factor in DEVICE_FACTOR.items():
        for flow in ("playground_2_5_prometheus", "flux1_dev"):
            for steps in (20, 40):
                rows.append(("2025-01-01", gpu, flow, f"{steps}steps", False, factor * (0.5 + 0.1 * steps)))
            rows.append(("2025-01-01", gpu, flow, "20steps", True, 99.0))
    columns = ["date", "gpu", "flow", "test_case", "weights_unloaded", "exec_s"]
    return pl.DataFrame(rows, schema=columns, orient="row")


@pytest.fixture
def engine_tables(tmp_path: Path) -> Path:
    """A folder with every table that the engine fit reads."""
    step_rows().write_parquet(tmp_path / "modelled_steps_aiconfigurator.parquet")
    flow_rows().write_parquet(tmp_path / "measured_comfyui_flows.parquet")
    systems = ["h100_sxm", "a100_sxm", "l40s"]
    specs = pl.DataFrame({"system": systems, "mem_gib": [80.0, 80.0, 45.0], "mem_bw_gbs": [3350.0, 2039.0, 864.0]})
    specs.write_csv(tmp_path / "gpu_specs.csv")
    point: dict[str, Any] = {
        "backend": "vllm",
        "model_path": "x",
        "precision": "fp8",
        "system": "h100_sxm",
        "mode": "agg",
    }
    point |= {"isl": 1024, "osl": 1024, "tp_size": 1.0, "concurrency": 8.0, "tpot_ms": 9.0}
    point |= {"pp_size": 1.0, "moe_ep_size": 1.0, "attention_dp_size": 1.0}
    pl.DataFrame([point]).write_parquet(tmp_path / "measured_ttft_tpot_silicon.parquet")
    return tmp_path


def test_the_step_coefficients_are_recovered(engine_tables: Path) -> None:
    (profile,) = engine.fit_engine(engine_tables)
    assert (profile["model"], profile["device"], profile["tp"]) == ("qwen3-8b", "h100", 1)
    for name, value in TRUE.items():
        assert profile[name] == pytest.approx(value, rel=0.02), name
    assert profile["fit_p90_error"] < 0.02


def test_the_kv_capacity_is_what_weights_and_reserve_leave(engine_tables: Path) -> None:
    (profile,) = engine.fit_engine(engine_tables)
    free_bytes = 0.9 * 80 * 2**30 - 8.19e9 * 2 - 2 * 2**30
    assert profile["kv_capacity_tokens"] == int(free_bytes / (2 * 36 * 8 * 128 * 2))
    assert profile["cost_weight"] == pytest.approx(3350 / 864, abs=1e-3)


def test_the_image_service_time_is_recovered_on_every_device(engine_tables: Path) -> None:
    found = {(p["model"], p["device"]): p for p in engine.fit_images(engine_tables)}
    assert len(found) == 6
    for (_, device), profile in found.items():
        factor = {"h100": 1.0, "a100": 2.0, "l40s": 3.0}[device]
        assert profile["base_s"] == pytest.approx(0.5 * factor, rel=0.02)
        assert profile["megapixel_step_s"] == pytest.approx(0.1 * factor, rel=0.02)


def test_the_engine_script_writes_the_same_profiles_twice(engine_tables: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("one.json", "two.json"):
        arguments = [
            "--engine",
            str(engine_tables),
            "--out",
            str(tmp_path / name),
            "--report",
            str(tmp_path / "report"),
        ]
        engine.main(arguments)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert len(json.loads(texts[0])["profiles"]) == 1


@pytest.mark.parametrize("column", ["batch", "latency_ms"])
def test_a_missing_column_is_named_with_its_file(engine_tables: Path, column: str) -> None:
    path = engine_tables / "modelled_steps_aiconfigurator.parquet"
    pl.read_parquet(path).drop(column).write_parquet(path)
    with pytest.raises(engine.TableError, match=f"modelled_steps_aiconfigurator.parquet has no column {column}"):
        engine.fit_engine(engine_tables)


def test_a_missing_file_is_named_with_the_columns_expected_of_it(tmp_path: Path) -> None:
    with pytest.raises(engine.TableError, match=r"lengths\.parquet does not exist; expected .* out_tokens"):
        lengths.load(tmp_path)


@pytest.fixture
def prompt_tables(tmp_path: Path) -> Path:
    """4,000 prompts: small models at 100 tokens, 70B models half as long again and twice as sensitive to the prompt."""
    rng = np.random.default_rng(1)
    n, rows = 4000, []
    effect = rng.normal(0, 0.4, n)
    sizes = {"tiny-2b": 2.0, "tiny-3b": 3.0, "large-70b": 70.0, "large-72b": 72.0, "mid-8b": 8.0, "closed": None}
    for model, size in sizes.items():
        large = size is not None and size >= 70
        mean, slope = (np.log(1500.0), 2.0) if large else (np.log(1000.0), 1.0)
        tokens = np.exp(mean + slope * effect + rng.normal(0, 0.2, n))
        rows += [(str(p), "zeroeval/gsm", model, round(t), 100_000) for p, t in enumerate(tokens)]
    rows.append(("truncated", "zeroeval/gsm", "tiny-2b", 99_000, 100_000))
    frame = pl.DataFrame(rows, schema=["prompt_id", "source", "model", "out_tokens", "limit"], orient="row")
    frame.write_parquet(tmp_path / "lengths.parquet")
    pl.DataFrame({"model": list(sizes), "params_total_b": list(sizes.values())}).write_csv(tmp_path / "models.csv")
    return tmp_path


def test_offset_slope_and_residual_are_recovered_despite_noise_in_both(prompt_tables: Path) -> None:
    found = lengths.fit(lengths.load(prompt_tables), "small", noise=0.1, draws=5)["70b"]
    assert found["offset"] == pytest.approx(np.log(1.5), abs=0.02)
    assert found["slope"] == pytest.approx(2.0, rel=0.02)
    assert found["residual_sd"] == pytest.approx(0.2, abs=0.02)
    assert found["interaction_sd"] == pytest.approx(np.sqrt(0.2**2 - 0.1**2), abs=0.02)
    assert found["predictive_slope"] == pytest.approx(2.0 * 0.4**2 / (0.4**2 + 0.2**2), rel=0.03)
    assert (found["n_models"], found["sources"]) == (2, ["zeroeval/gsm"])


def test_outputs_at_the_limit_are_left_out(prompt_tables: Path) -> None:
    models, y, _ = lengths.load(prompt_tables)["zeroeval/gsm"]
    assert np.nanmax(y[:, models.index("tiny-2b")]) < np.log(90_000)
    assert len(y) == 4000


def test_the_lengths_script_writes_every_class_present(prompt_tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "factors.json"
    arguments = ["--prompts", str(prompt_tables), "--out", str(out), "--report", str(tmp_path / "r"), "--draws", "2"]
    lengths.main(arguments)
    assert set(json.loads(out.read_text())["classes"]) == {"8b", "70b"}

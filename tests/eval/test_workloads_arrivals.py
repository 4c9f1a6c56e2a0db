"""Arrivals: the rate that was asked for, the burstiness that is documented, and traces that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from eval.workloads.arrivals import BURSTS, Arrivals, arrival_times
from eval.workloads.traces import read_trace
from swarmx.core.errors import ConfigError

_TRACE = np.array([0.0, 1.0, 1.0, 100.0, 101.0])


def _cv(times: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


@pytest.mark.parametrize("kind", ["poisson", "bursty"])
def test_another_rate_only_stretches_the_same_arrivals(kind: Arrivals) -> None:
    slow, fast = (arrival_times(kind, 500, rate, 3) for rate in (2.0, 8.0))
    assert np.allclose(slow, 4.0 * fast)
    assert slow[-1] == pytest.approx(250.0)
    assert np.all(np.diff(slow) >= 0.0)
    assert not np.allclose(arrival_times(kind, 500, 2.0, 4), slow)


def test_poisson_gaps_vary_as_much_as_their_mean() -> None:
    assert _cv(arrival_times("poisson", 20_000, 1.0, 0)) == pytest.approx(1.0, abs=0.05)


def test_bursts_have_the_variation_of_the_trace_they_were_fitted_to() -> None:
    seeds = [_cv(arrival_times("bursty", 60_000, 1.0, seed)) for seed in range(6)]
    assert np.mean(seeds) == pytest.approx(BURSTS.cv, rel=0.1)
    assert BURSTS.burst == pytest.approx(48.2, abs=0.5)
    assert BURSTS.silence == pytest.approx(112.5, abs=1.0)


def test_half_of_the_ten_second_windows_at_the_trace_rate_are_empty() -> None:
    times = arrival_times("bursty", 100_000, 3.12, 1)
    counts = np.histogram(times, np.arange(0.0, times[-1], 10.0))[0]
    assert float((counts == 0).mean()) == pytest.approx(0.53, abs=0.03)


def test_the_gaps_of_a_trace_come_in_its_order_from_a_place_that_the_seed_chooses() -> None:
    times = arrival_times("azure_code", 8, 1.0, 5, _TRACE)
    gaps = np.diff(times, prepend=0.0)
    whole = np.diff(_TRACE)
    turns = [np.roll(whole, -i) for i in range(4)]
    assert any(np.allclose(gaps / gaps.sum(), np.tile(turn, 2) / (2 * whole.sum())) for turn in turns)
    assert times[-1] == pytest.approx(8.0)


def test_a_kind_or_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of poisson"):
        arrival_times("steady", 5, 1.0, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rate above zero"):
        arrival_times("poisson", 5, 0.0, 0)
    with pytest.raises(ConfigError, match="give --arrivals"):
        arrival_times("mooncake", 5, 1.0, 0)


def _write(path: Path, **columns: list[Any]) -> Path:
    pl.DataFrame(columns).write_parquet(path)
    return path


def test_a_long_silence_is_part_of_a_trace(tmp_path: Path) -> None:
    path = _write(tmp_path / "any.parquet", timestamp_s=_TRACE.tolist())
    assert read_trace(path, "servegen").tolist() == _TRACE.tolist()


def test_a_folder_is_searched_for_the_trace_and_its_service(tmp_path: Path) -> None:
    _write(tmp_path / "azure_llm_2023.parquet", timestamp_s=[0.0, 0.5, 1.0, 1.5], service=["code", "conv"] * 2)
    assert read_trace(tmp_path, "azure_conv").tolist() == [0.5, 1.5]
    with pytest.raises(ConfigError, match=r"mooncake_conversation\.parquet"):
        read_trace(tmp_path, "mooncake")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"timestamp_s": [0.0, 2.0, 1.0]}, "1 rows have a time before the one above it, the first is row 2"),
        ({"timestamp_s": [-1.0, 2.0]}, "negative"),
        ({"timestamp_s": [0.0, None]}, "missing"),
        ({"timestamp_s": [0.0, float("nan")]}, "missing"),
        ({"timestamp_s": [1.0, 1.0]}, "within no time"),
        ({"timestamp_s": [1.0]}, "1 arrivals"),
        ({"timestamp_s": []}, "no rows"),
        ({"when": [0.0, 1.0]}, "lacks the columns timestamp_s"),
        ({"timestamp_s": [0.0, 1.0], "input_tokens": [5, 0], "output_tokens": [1, 1]}, "no input_tokens"),
        ({"timestamp_s": [0.0, 1.0], "service": ["code", "code"]}, "no row of the service 'conv'"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(_write(tmp_path / "bad.parquet", **columns), "azure_conv")

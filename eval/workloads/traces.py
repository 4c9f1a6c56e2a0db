"""Recorded arrival times: Azure, Mooncake, ServeGen, or any table with a column of seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from eval.workloads.arrivals import Arrivals
from eval.workloads.reading import read_table, refuse, table_file
from swarmx.core.errors import ConfigError

TRACES: dict[Arrivals, tuple[str, str]] = {
    "azure_code": ("azure_llm_2023.parquet", "code"),
    "azure_conv": ("azure_llm_2023.parquet", "conv"),
    "mooncake": ("mooncake_conversation.parquet", ""),
    "servegen": ("servegen_sampled_m_large.parquet", ""),
}
"""File and service of each recorded kind of arrivals."""

_TOKENS = ("input_tokens", "output_tokens")


def read_trace(source: Path, kind: Arrivals) -> NDArray[np.float64]:
    """The times of `kind` in seconds, [arrivals], rising.

    Silences, however long, are part of a trace and stay in it; several arrivals at one time are legal, too. Times that
    are negative, fall or are missing are an error, and so are rows of no tokens where the trace tells of tokens.
    Raises ConfigError.
    """
    name, service = TRACES[kind]
    path = table_file(source, name)
    rows = read_table(path, ("timestamp_s",), ("service", *_TOKENS))
    if service and rows["service"].null_count() < rows.height:
        rows = rows.filter(pl.col("service") == service)
        if rows.is_empty():
            raise ConfigError(f"{path} has no row of the service {service!r}.")
    rows = rows.with_row_index("row")
    at_s = pl.col("timestamp_s").cast(pl.Float64)
    refuse(rows, ~at_s.is_finite() | (at_s < 0.0), path, "a time that is negative or missing", "row")
    refuse(rows, at_s.diff().fill_null(0.0) < 0.0, path, "a time before the one above it", "row")
    for column in _TOKENS:
        refuse(rows, (pl.col(column).cast(pl.Float64) <= 0.0).fill_null(False), path, f"no {column}", "row")
    times = rows["timestamp_s"].cast(pl.Float64).to_numpy()
    if len(times) < 2 or not times[-1] > times[0]:
        raise ConfigError(f"{path} has {len(times)} arrivals within no time; expected two at different times or more.")
    return times

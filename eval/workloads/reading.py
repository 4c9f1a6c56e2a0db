"""Reading the tables that workloads are drawn from, and saying clearly what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import msgspec
import polars as pl

from swarmx.core.errors import ConfigError
from swarmx.neural.splits import SplitBy, split_of

Part = Literal["tuning", "evaluation", "everything"]
"""`tuning` are the validation prompts, sessions and images, `evaluation` the test ones, by the frozen splits; the two
have nothing in common. `everything` is for data on which nothing was trained."""


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where the data is: each a folder laid out as the shared one of that name, or one file in the same schema."""

    prompts: Path | None = None
    arrivals: Path | None = None
    sessions: Path | None = None
    engine: Path | None = None


def belongs(part: Part, by: SplitBy, key: str) -> bool:
    """Whether a prompt, session or row is of this part."""
    if part not in get_args(Part):
        raise ConfigError(f"the split is {part!r}, expected one of {', '.join(get_args(Part))}.")
    return part == "everything" or split_of(by, key) == ("validation" if part == "tuning" else "test")


def table_file(source: Path, name: str) -> Path:
    """The file itself, or `name` in a folder. Raises ConfigError when there is none."""
    path = source / name if source.is_dir() else source
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; expected a folder with {name}, or such a file.")
    return path


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pl.DataFrame:
    """The columns of a parquet or CSV file, categories as text; optional ones that it lacks are null.

    Raises ConfigError when it cannot be read, misses a column, or has no row.
    """
    try:
        table = pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"cannot read {path}: {error}; expected a parquet or CSV table.") from None
    if missing := [column for column in columns if column not in table.columns]:
        raise ConfigError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(table.columns)}.")
    if table.is_empty():
        raise ConfigError(f"{path} has no rows; nothing can be drawn from it.")
    absent = [pl.lit(None).alias(column) for column in optional if column not in table.columns]
    return table.with_columns(absent).select(*columns, *optional).with_columns(pl.col(pl.Categorical).cast(pl.String))


def refuse(table: pl.DataFrame, wrong: pl.Expr, path: Path, what: str, name: str) -> None:
    """Raises ConfigError with the number of rows where `wrong` is true, or null, and the first one's `name`."""
    bad = table.filter(wrong.fill_null(True))
    if bad.height:
        raise ConfigError(f"{path}: {bad.height} rows have {what}, the first is {name} {bad[name][0]!r}; correct them.")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

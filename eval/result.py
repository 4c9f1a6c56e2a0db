"""How every experiment leaves its result: `result.json` for machines, `result.md` for people."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec

Value = str | int | float | bool | None
Row = Mapping[str, Value]
Op = Literal["<", "<=", ">", ">="]

_PACKAGES = ("numpy", "msgspec")


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One aim, computed from the rows; a suffix of the name after `@` says the condition."""

    name: str
    value: float
    aim: float
    op: Op
    met: bool


def claim(name: str, value: float, op: Op, aim: float) -> Claim:
    """The claim, with its verdict."""
    met = {"<": value < aim, "<=": value <= aim, ">": value > aim, ">=": value >= aim}[op]
    return Claim(name=name, value=value, aim=aim, op=op, met=met)


def write_result(
    out_dir: Path,
    command: str,
    rows: Sequence[Row],
    claims: Sequence[Claim],
    seeds: Sequence[int],
    data_files: Sequence[Path] = (),
) -> Path:
    """Write both files into `out_dir`, which is made if need be; returns the path of the JSON."""
    meta = {
        "command": command,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": f"{platform.machine()} {sys.platform}",
        "seeds": list(seeds),
        "data_files": {path.name: sha256(path.read_bytes()).hexdigest() for path in data_files},
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "result.json"
    result = {"meta": meta, "rows": [dict(row) for row in rows], "claims": claims}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    verdicts: list[Row] = [
        {"claim": c.name, "value": c.value, "aim": f"{c.op} {c.aim:g}", "met": c.met} for c in claims
    ]
    parts = [f"`{command}`", table(rows), *([table(verdicts)] if verdicts else [])]
    (out_dir / "result.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with all the columns that some row has."""
    if not rows:
        return "(no rows)"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

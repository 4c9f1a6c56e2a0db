"""What the demo tells at its end: latencies by kind and policy, how busy the replicas were, one decision explained."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swarmx.demo.corpus import KINDS
from swarmx.tables import print_decision

if TYPE_CHECKING:
    from swarmx.demo.run import Pass


def summarise(passes: Sequence[Pass], *, engine: str, scale: float, seed: int) -> dict[str, Any]:
    """Flat rows, one for each (policy, kind), in the form of `result.json`; times in emulated seconds."""
    rows = [row for one in passes for row in _rows(one, scale)]
    return {
        "meta": {
            "command": "swarmx demo",
            "engine": engine,
            "time_scale": scale,
            "seeds": [seed],
            "python": platform.python_version(),
            "void": {one.policy: one.voids for one in passes if one.voids},
        },
        "rows": rows,
        "claims": [],
    }


def _rows(one: Pass, scale: float) -> list[dict[str, Any]]:
    rows = []
    for kind in (*KINDS, "all"):
        of_kind = [row for row in one.workflows if kind in (row["kind"], "all")]
        times = [(r["ended_at_s"] - r["created_at_s"]) * scale for r in of_kind if r["state"] == "finished"]
        p50, p95, top = np.percentile(times, (50, 95, 100)).tolist() if times else (None, None, None)
        rows.append(
            {
                "experiment": "demo",
                "policy": one.policy,
                "kind": kind,
                "n": len(of_kind),
                "finished": len(times),
                "p50_s": p50,
                "p95_s": p95,
                "max_s": top,
            }
        )
    return rows


def show(console: Console, result: dict[str, Any], passes: Sequence[Pass]) -> None:
    """The tables, for people."""
    table = Table("kind", "policy", "n", "finished", "median s", "P95 s", "max s", title="Workflow latency")
    for kind in (*KINDS, "all"):
        for row in result["rows"]:
            if row["kind"] == kind:
                times = (row["p50_s"], row["p95_s"], row["max_s"])
                cells = (f"{t:.1f}" if t is not None else "-" for t in times)
                table.add_row(kind, row["policy"], str(row["n"]), str(row["finished"]), *cells)
        table.add_section()
    console.print(table)

    table = Table("replica", "device", title="Share of the time with a call in flight, and calls")
    for one in passes:
        table.add_column(one.policy, justify="right")
    for rows in zip(*(one.replicas for one in passes), strict=True):
        cells = (f"{row['utilisation']:4.0%} {row['calls']:4d}" for row in rows)
        table.add_row(rows[0]["replica_id"], rows[0]["device"], *cells)
    console.print(table)

    table = Table("forecast by", "calls", "≤ P50", "≤ P90", "≤ P99", title="Lengths against their forecasts, last pass")
    for row in passes[-1].forecasts:
        shares = (f"{row[name]:.0%}" for name in ("at_p50", "at_p90", "at_p99"))
        table.add_row(row["source"], str(row["calls"]), *shares)
    console.print(table)

    explained = passes[-1].explained
    if explained is not None:
        console.print("[bold]One decision, explained[/], in wall seconds (`swarmx why CALL` does this for any call):")
        print_decision(console, explained)
    for one in passes:
        for void in one.voids:
            console.print(f"[bold red]The {one.policy} pass is void:[/] {void}")

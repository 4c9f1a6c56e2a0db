"""What the crowd part of the demo tells: a time line of alerts, proposals and replicas, and how the crowd fared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console

from swarmx.demo.crowd import CROWDED, QUESTION, Crowd, CrowdRun, cost
from swarmx.tables import columns


def summarise_crowd(run: CrowdRun, shape: Crowd, *, scale: float, seed: int, coordinator: str) -> list[dict[str, Any]]:
    """Flat rows in the form of `result.json`; times in emulated seconds."""
    rows = []
    for part, begins_s, ends_s in (
        ("before", 0.0, shape.begins_s),
        ("crowd", shape.begins_s, shape.ends_s),
        ("after", shape.ends_s, float("inf")),
        ("all", 0.0, float("inf")),
    ):
        came = [r for r in run.workflows if begins_s <= (r["created_at_s"] - run.began_at_s) * scale < ends_s]
        times = [(r["ended_at_s"] - r["created_at_s"]) * scale for r in came if r["state"] == "finished"]
        p50, p95, top = np.percentile(times, (50, 95, 100)).tolist() if times else (None, None, None)
        rows.append(
            {
                "experiment": "crowd",
                "coordinator": coordinator,
                "seed": seed,
                "part": part,
                "n": len(came),
                "finished": len(times),
                "p50_s": p50,
                "p95_s": p95,
                "max_s": top,
                "cost": cost(run) * scale if part == "all" else None,
            }
        )
    return rows


def show_crowd(console: Console, rows: list[dict[str, Any]], run: CrowdRun, *, scale: float) -> None:
    """The time line, the table, what the console says of it, and whether the audit log is whole."""
    console.print("[bold]What happened[/], in emulated seconds since the start:")
    for at_s, line in sorted(_timeline(run)):
        console.print(f"  {max(0.0, at_s - run.began_at_s) * scale:5.0f}  {line}", highlight=False, markup=False)
    table = columns("workflows", "n", "finished", "median s", "P95 s", "max s", title="The crowd")
    for row in rows:
        times = (f"{row[name]:.1f}" if row[name] is not None else "-" for name in ("p50_s", "p95_s", "max_s"))
        table.add_row(row["part"], str(row["n"]), str(row["finished"]), *times)
    console.print(table)
    console.print(f'[bold]swarmx ask "{QUESTION}"[/], its first lines:')
    for line in run.answer[:6]:
        console.print(f"  {line}", highlight=False, markup=False)
    whole = "is whole" if run.sound else "[bold red]is damaged[/]"
    console.print(f"The audit log of this run {whole}: {len(run.records)} records (`swarmx audit verify`).")
    for void in run.voids:
        console.print(f"[bold red]The run is void:[/] {void}")


def _timeline(run: CrowdRun) -> Iterator[tuple[float, str]]:
    for alert in run.alerts:
        if alert["kind"] == "at_max":
            yield alert["at_s"], f"alert: {alert['subject']} wants {alert['value']:.0f} replicas, more than it may have"
        else:
            yield alert["at_s"], f"alert: {alert['kind']} {alert['subject']}"
    for proposal in run.proposals:
        changes = ", ".join(
            f"{c['subject']} {c['what']} {c['before']} → {c['after']}" for c in proposal["diff"]["changes"]
        )
        who = proposal["actor"]["name"]
        yield proposal["at_s"], f"{who} proposes {proposal['call']['tool']}: {changes} ({proposal['reason']})"
        if proposal["applied_at_s"] is not None and proposal["decided_by"] is not None:
            yield proposal["applied_at_s"], f"{proposal['decided_by']['name']} approves it; it is applied"
        if proposal["verified_at_s"] is not None:
            yield proposal["verified_at_s"], f"verified: {proposal['state']} ({proposal['detail']})"
    for record in run.records:
        entry = record["entry"]
        if entry["tool"] in ("deploy", "drain") and entry["kind"] == "outcome":
            done = f"{entry['tool']} of {entry['arguments']['replica_id']}: {entry['outcome']}"
            yield record["at_s"], f"{entry['actor']['name']}: {done}, {entry['detail']}"
    most = max(held for _, held, _ in run.samples)
    at_s = next(at_s for at_s, held, _ in run.samples if held == most)
    yield run.began_at_s + at_s, f"{CROWDED} has its most replicas: {most}"

"""Tables for people, shared by the command line and the demo."""

from __future__ import annotations

from math import inf
from typing import Any

from rich.console import Console
from rich.table import Table


def columns(*names: str, title: str | None = None) -> Table:
    """A table whose first column, the one that people copy, is never cut."""
    table = Table(title=title)
    for position, name in enumerate(names):
        table.add_column(name, no_wrap=position == 0, overflow="fold")
    return table


def print_decision(console: Console, item: dict[str, Any]) -> None:
    """The explanation, and the table of candidates that it rests on."""
    for line in item["explanation"]:
        console.print(line, highlight=False)
    decision = item["decision"]
    seen = decision["candidates"]
    costs = seen["cost_s"]
    terms = dict(seen["terms_s"])
    table = columns(
        "candidate", "in flight", *(["expected s"] if costs else []), *(n.removesuffix("_s") for n in terms)
    )
    order = sorted(range(len(seen["replica_ids"])), key=lambda i: _cost(costs, i) if costs else seen["in_flight"][i])
    for i in order[:10]:
        name = seen["replica_ids"][i]
        style = "bold" if name == decision["replica_id"] else None
        cost = [_short(costs[i])] if costs else []
        table.add_row(name, str(seen["in_flight"][i]), *cost, *(_short(v[i]) for v in terms.values()), style=style)
    console.print(table)


def print_replicas(console: Console, rows: list[dict[str, Any]]) -> None:
    """One line a replica."""
    table = columns("replica", "model", "device", "state", "in flight", "calls", "busy", "provider")
    for row in rows:
        provider = "emulated" if row["emulated"] else row["provider"]
        busy = f"{row['utilisation']:.0%}"
        numbers = (str(row["in_flight"]), str(row["calls"]), busy)
        table.add_row(row["replica_id"], row["model"], row["device"], row["state"], *numbers, provider)
    console.print(table)


def _cost(costs: list[float | None], i: int) -> float:
    cost = costs[i]
    return inf if cost is None else cost


def _short(seconds: float | None) -> str:
    """Three digits; nothing where the policy had no finite number."""
    return "" if seconds is None else f"{seconds:.3g}"

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
    """The explanation, the table of candidates that it rests on, and what another policy would have done with it."""
    for line in item["explanation"]:
        console.print(line, highlight=False)
    decision = item["decision"]
    seen = decision["candidates"]
    costs = seen["cost_s"]
    terms = dict(seen["terms_s"])
    other = item.get("instead") or {}
    others = other.get("cost_s")
    table = columns(
        "candidate",
        "in flight",
        *(["expected s"] if costs else []),
        *(n.removesuffix("_s") for n in terms),
        *([f"by {other['policy']}"] if others else []),
    )
    order = sorted(range(len(seen["replica_ids"])), key=lambda i: _cost(costs, i) if costs else seen["in_flight"][i])
    best = order[:10]
    if other.get("replica_id") in seen["replica_ids"]:
        best = list(dict.fromkeys([*best, seen["replica_ids"].index(other["replica_id"])]))
    for i in best:
        name = seen["replica_ids"][i]
        style = "bold" if name == decision["replica_id"] else None
        cost = [_short(costs[i])] if costs else []
        there = [_short(others[i])] if others else []
        parts = (_short(v[i]) for v in terms.values())
        table.add_row(name, str(seen["in_flight"][i]), *cost, *parts, *there, style=style)
    console.print(table)
    for line in other.get("explanation", ()):
        console.print(line, highlight=False)


def print_calls(console: Console, rows: list[dict[str, Any]]) -> None:
    """One line a call that has ended, with the work that it came to and what had been forecast."""
    table = columns("call", "node", "model", "replica", "state", "seconds", "work", "P50..P90", "forecast by")
    for row in rows:
        seconds = f"{row['ended_at_s'] - row['ready_at_s']:.2f}"
        expected = f"{row['forecast_p50']:.0f}..{row['forecast_p90']:.0f}"
        told = row["call_id"], row["node"], row["model"], row["replica_id"], row["state"], seconds
        table.add_row(*told, f"{row['work_done']:.0f}", expected, row["forecast_version"] or row["forecast_source"])
    console.print(table)


def print_replicas(console: Console, rows: list[dict[str, Any]]) -> None:
    """One line a replica."""
    table = columns("replica", "model", "device", "state", "in flight", "calls", "busy", "call now", "provider")
    for row in rows:
        curve = row.get("service_curve")
        now = f"{_short(curve['p50_s'])}..{_short(curve['p90_s'])} s" if curve else ""
        provider = "emulated" if row["emulated"] else row["provider"]
        busy = f"{row['utilisation']:.0%}"
        numbers = (str(row["in_flight"]), str(row["calls"]), busy)
        table.add_row(row["replica_id"], row["model"], row["device"], row["state"], *numbers, now, provider)
    console.print(table)


def print_remaining(console: Console, remaining: dict[str, Any]) -> None:
    """What a running workflow is still expected to do, at the median and at P90."""
    parts = [(remaining["calls"], "calls"), (remaining["work"], "output tokens"), (remaining["path"], "s to the end")]
    if remaining["pause"] is not None:
        parts.append((remaining["pause"], "s until its tools are back"))
    told = ", ".join(f"{_at(forecast, 0.5):.3g} {what} (P90 {_at(forecast, 0.9):.3g})" for forecast, what in parts)
    console.print(f"Still to come: {told}.", highlight=False)


def print_program(console: Console, program: dict[str, Any]) -> None:
    """What was seen of a workflow that nobody declared: whose it is, its family, the tools it asked for."""
    family = [f"started by {program['parent_id']}"] if program["parent_id"] else []
    family += [f"started {name}" for name in program["subagents"]]
    source = f" of {program['source']}" if program["source"] else ""
    console.print(", ".join([f"Known from headers{source}", *family]) + ".", highlight=False)
    if program["tools"]:
        told = ", ".join(f"{tool} {times}" for tool, times in sorted(program["tools"].items()))
        console.print(f"Tools asked for: {told}; {program['gaps_s']:.3g} s of waiting for them.", highlight=False)


def _at(forecast: dict[str, Any], level: float) -> float:
    """The quantile at the level that is nearest."""
    levels = forecast["levels"]
    return float(forecast["quantiles"][min(range(len(levels)), key=lambda i: abs(levels[i] - level))])


def _cost(costs: list[float | None], i: int) -> float:
    cost = costs[i]
    return inf if cost is None else cost


def _short(seconds: float | None) -> str:
    """Three digits; nothing where the policy had no finite number."""
    return "" if seconds is None else f"{seconds:.3g}"

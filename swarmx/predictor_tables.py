"""Explanations, reports and trained weights as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from swarmx.tables import columns

if TYPE_CHECKING:
    from swarmx.neural.report import PredictorReport
    from swarmx.neural.scores import Scores

_SHOWN_WORDS = 12
_SHOWN_LABELS = 12
_OF_PROMPT = ("kind of text", "words", "size and marks")


def print_explanation(console: Console, data: dict[str, Any]) -> None:
    """The forecast, what moved it there from the base, the words, and the nearest prompts."""
    found = data["explanation"]
    quantile = dict(zip(found["levels"], found["quantiles"], strict=True))
    who = data["model"] + (f" for {data['role']}" if data["role"] else "")
    console.print(
        f"{who}: {found['median']:.0f} output tokens at the median, {quantile[0.9]:.0f} at P90, {quantile[0.99]:.0f} "
        f"at P99 ({found['head']}).",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"{_seen(data)} Kind of text {found['kind']} ({found['kind_share']:.0%}).", highlight=False)
    if call := data["call"]:
        console.print(
            f"The call {call['call_id']} was forecast {call['forecast_p50']:.0f} at the median and "
            f"{call['forecast_p90']:.0f} at P90 ({call['forecast_version'] or call['forecast_source']}), and came to "
            f"{call['work_done']:.0f}. Its text was not kept, so words cannot be told.",
            highlight=False,
            soft_wrap=True,
        )
    table = columns("what is known", "factor", title="From nothing known to this forecast")
    table.add_row("nothing", f"{found['base']:.0f} tokens")
    together = 1.0
    for move in found["moves"]:
        table.add_row(move["name"], f"×{move['factor']:.2f}")
        if move["name"] in _OF_PROMPT:
            together *= move["factor"]
            if move["name"] == _OF_PROMPT[-1]:
                table.add_row("  the prompt, together", f"×{together:.2f}", style="dim")
    table.add_row("all of it", f"{found['median']:.0f} tokens", style="bold")
    console.print(table)
    _print_words(console, data)
    if data["nearest"]:
        table = columns("call", "model", "role", "tokens", "similarity", title="Nearest remembered prompts")
        for row in data["nearest"]:
            told = row["call_id"], row["model"], row["role"], f"{row['tokens']:.0f}", f"{row['similarity']:.2f}"
            table.add_row(*told)
        console.print(table)


def print_report(console: Console, report: PredictorReport, files: Sequence[Path]) -> None:
    """The scores of all rows and of the most frequent models; the page has the rest."""
    for note in report.notes:
        console.print(note, highlight=False, soft_wrap=True)
    for found in report.sets:
        table = columns(
            found.name, "rows", "pinball", "relative", "CRPS", "at 50 %", "at 80 %", "at 90 %", "at 99 %", "Kendall τ"
        )
        table.add_row("all rows", *_cells(found.overall), style="bold")
        for label, scores in list(found.by.get("model", {}).items())[:_SHOWN_LABELS]:
            table.add_row(label, *_cells(scores))
        console.print(table)
    for said in report.served:
        console.print(
            f"As served by {said.source}: {said.at_p50:.1%} of {said.rows} outcomes at or below P50, {said.at_p90:.1%} "
            "at or below P90.",
            highlight=False,
        )
    console.print(f"Written: {', '.join(str(path) for path in files)}", highlight=False, soft_wrap=True)


def print_trained(console: Console, result: dict[str, Any]) -> None:
    """One line for each card that was written."""
    table = columns("weights", "test rows", "pinball", "CRPS", "at 50 %", "at 90 %", "at 99 %", "Kendall τ")
    for card in result["weights"]:
        metrics, calibration = card["metrics"], card["calibration"]
        covered = [_percent(calibration.get(level)) for level in ("0.5", "0.9", "0.99")]
        numbers = [_short(metrics.get(name)) for name in ("pinball", "crps")]
        rows = str(card["counts"].get("test", ""))
        table.add_row(card["version"], rows, *numbers, *covered, _short(metrics.get("kendall_tau")))
    console.print(table)
    console.print(f"Written to {result['out']}; predictor.weights puts them in force.", highlight=False, soft_wrap=True)


def print_retrained(console: Console, result: dict[str, Any]) -> None:
    """What training from memory came to."""
    console.print(
        f"{result['before']}: loss {result['loss_before']:.4f} on {result['held_back']} calls that were held back; "
        f"trained again on the others of {result['rows']}: {result['loss_after']:.4f}.",
        highlight=False,
        soft_wrap=True,
    )
    if result["version"]:
        worse = "" if result["better"] else ", although it is not better"
        console.print(f"Written to {result['out']}: {result['version']}{worse}.", highlight=False, soft_wrap=True)
    else:
        console.print("Not better, so nothing was written; --force writes it all the same.", highlight=False)


def _print_words(console: Console, data: dict[str, Any]) -> None:
    words = [word for word in data["explanation"]["words"] if f"{word['factor']:.3f}" != "1.000"]
    if not words:
        if not data["call"]:
            console.print("No word of the prompt moves this forecast.")
        return
    table = columns("word or pair", "times", "factor", title="Without this word the median would be smaller by")
    for word in words[:_SHOWN_WORDS]:
        table.add_row(" or ".join(word["words"]), str(word["times"]), f"×{word['factor']:.3f}")
    console.print(table)
    rest = len(words) - _SHOWN_WORDS + data["explanation"]["untried"]
    if rest > 0:
        console.print(f"{rest} more words and pairs move it less; --json has those that were tried.", highlight=False)


def _seen(data: dict[str, Any]) -> str:
    found = data["explanation"]
    known = [f"{found['model_seen']} answers of the model"] if found["model_seen"] else []
    known += [f"{found['role_seen']} of the role"] if found["role_seen"] else []
    if not known:
        return "Neither model nor role was seen before: the forecast is wide."
    return f"It knows {' and '.join(known)}, with {data['learnt_from']} calls of the state folder."


def _cells(scores: Scores) -> list[str]:
    covered = [_percent(scores.coverage[level]) for level in ("0.5", "0.8", "0.9", "0.99")]
    numbers = [f"{scores.pinball:.2f}", f"{scores.pinball_log:.4f}", f"{scores.crps:.1f}"]
    return [str(scores.rows), *numbers, *covered, _short(scores.kendall_tau)]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

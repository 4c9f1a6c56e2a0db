"""Recorded agent sessions as turns: how the input grew, what was answered, and how long tools took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from eval.workloads.casting import CONTEXT_TOKENS
from eval.workloads.draft import SMALL, Drawn, Turn
from eval.workloads.invented import constant
from eval.workloads.reading import Part, belongs, read_table, refuse, table_file
from swarmx.core.errors import ConfigError

_COLUMNS = ("session", "dataset", "domain", "step", "kind", "agent", "model", "input_tokens", "output_tokens")
_OPTIONAL = ("t_rel_s", "latency_s", "gap_to_next_s", "text_tail")
_MOST_WITHOUT = 0.5

# What an answer of the recorded service took, where only the time to the next call is known: the least-squares fit of
# gpt-4o's latency over all sessions with both. What is left of the gap is the tool's.
_ANSWER_BASE_S, _ANSWER_TOKEN_S = 0.74, 0.0109

LONGEST_ANSWER = 8192


@dataclass(frozen=True, slots=True)
class SessionRows:
    """Draws a session. `left_out` counts those with a call of no tokens, `runaway` those with an endless answer."""

    sessions: tuple[tuple[Turn, ...], ...]
    left_out: int
    runaway: int = 0

    def draw(self, rng: np.random.Generator) -> tuple[Turn, ...]:
        """One of them, each as likely."""
        return self.sessions[int(rng.integers(len(self.sessions)))]


def read_sessions(source: Path, part: Part) -> SessionRows:
    """Read and check sessions of `part`.

    Sessions with a call of no tokens (their provider did not report some) are left out; when they are more than half
    it is an error. Left out, too, are those with an answer of more than `LONGEST_ANSWER` tokens: such answers run on
    until the recorder cuts them, and one such session would be the tail of its kind by itself. Errors are steps or
    times that fall, negative numbers, and calls beyond the model's context. Raises ConfigError.
    """
    path = table_file(source, "sessions.parquet")
    rows = read_table(path, _COLUMNS, _OPTIONAL)
    calls = pl.col("kind") == "llm"
    refuse(rows, ~pl.col("kind").is_in(["llm", "tool"]), path, "a kind that is neither llm nor tool", "session")
    step = pl.col("step").diff().over("session").fill_null(1)
    refuse(rows, step <= 0, path, "a step that does not rise", "session")
    clock = pl.col("t_rel_s").cast(pl.Float64)
    fall = clock.diff().over("session").fill_null(0.0) < -1e-3
    refuse(rows, fall | (clock < 0.0).fill_null(False), path, "a time that is negative or falls", "session")
    for column in ("latency_s", "gap_to_next_s"):
        refuse(rows, (pl.col(column) < 0.0).fill_null(False), path, f"a negative {column}", "session")
    asked = rows.filter(calls)
    if asked.is_empty():
        raise ConfigError(f"{path} has no call to a language model (kind llm); nothing can be drawn from it.")
    tokens = pl.col("input_tokens"), pl.col("output_tokens")
    refuse(asked, (tokens[0] < 0) | (tokens[1] < 0), path, "fewer than no tokens, or none given", "session")
    most = CONTEXT_TOKENS[SMALL]
    refuse(asked, tokens[0] + tokens[1] > most, path, f"more tokens than a context of {most}", "session")
    shared = _shared(asked)
    found: list[tuple[Turn, ...]] = []
    left_out = runaway = 0
    for (session,), group in rows.group_by("session", maintain_order=True):
        if not belongs(part, "session", str(session)):
            continue
        of_calls = group.filter(calls)
        if of_calls.is_empty() or (of_calls.select(pl.min_horizontal(*tokens).min()).item() or 0) <= 0:
            left_out += 1
            continue
        if (of_calls.select(tokens[1].max()).item() or 0) > LONGEST_ANSWER:
            runaway += 1
            continue
        found.append(tuple(_turns(group, shared, len(found))))
    if not found or left_out > _MOST_WITHOUT * (len(found) + left_out):
        raise ConfigError(
            f"{path}: {len(found)} sessions of the {part} part can be used, {left_out} have calls of no tokens; "
            "give more sessions, or another split."
        )
    return SessionRows(tuple(found), left_out, runaway)


_Group = tuple[str, str, str]


def _shared(asked: pl.DataFrame) -> dict[_Group, int]:
    """Tokens of the system prompt of each (dataset, domain, agent): a share of the shortest first prompt."""
    first = asked.filter(pl.col("input_tokens") > 0).unique(["session", "agent"], keep="first", maintain_order=True)
    shortest = first.group_by("dataset", "domain", "agent").agg(pl.col("input_tokens").min(), pl.len())
    share = constant("session_shared")
    return {(d, m, a): int(share * least) if n > 1 else 0 for d, m, a, least, n in shortest.iter_rows()}


def _turns(group: pl.DataFrame, shared: dict[_Group, int], source: int) -> list[Turn]:
    turns: list[Turn] = []
    gap_s = 0.0
    for row in group.iter_rows(named=True):
        if row["kind"] == "tool":
            gap_s += row["latency_s"] or 0.0
            continue
        key = (row["dataset"], row["domain"], row["agent"])
        turns.append(
            Turn(
                role=row["agent"], drawn=_drawn(row, source), gap_s=min(gap_s, constant("longest_session_gap")),
                shared="|".join(map(str, key)), shared_tokens=shared.get(key, 0),
            )
        )  # fmt: skip
        gap_s = _gap_s(row)
    return turns


def _gap_s(row: dict[str, Any]) -> float:
    """From the end of this call to the next, but for tools that have rows of their own."""
    least = constant("session_gap")
    if row["gap_to_next_s"] is None:
        return least
    answer_s = _ANSWER_BASE_S + _ANSWER_TOKEN_S * int(row["output_tokens"])
    return max(least, float(row["gap_to_next_s"]) - answer_s)


def _drawn(row: dict[str, Any], source: int) -> Drawn:
    work = int(row["output_tokens"])
    return Drawn(
        text=row["text_tail"] or "", data_model=row["model"] or row["dataset"], prompt_tokens=int(row["input_tokens"]),
        work=work, work_limit=max(constant("work_limit"), float(work)), source=source,
    )  # fmt: skip

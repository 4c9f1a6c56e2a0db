"""Sessions as training data: what is refused, who belongs to which split, and that nothing leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from swarmx.core.errors import PredictorError
from swarmx.neural.heads.structure import FEATURES, SPECS
from swarmx.neural.training.fit import FitSettings
from swarmx.neural.training.structure import load_sessions, rows_of, told, train_structure, where
from tests.neural.structures import a_step, counted_sessions, sessions_file


def column(rows: Any, name: str) -> np.ndarray:
    return rows.tables["calls"].features[:, FEATURES.index(name)]


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_file_and_its_folder_are_the_same(tmp_path: Path, by_folder: bool) -> None:
    path = sessions_file(tmp_path, [a_step("s", 1), a_step("s", 0), a_step("s", 2, kind="tool", model=None)])
    (session,) = load_sessions(tmp_path if by_folder else path)
    assert [call.prompt_tokens for call in session.calls] == [100.0, 110.0]
    assert (session.calls[0].arrived_s, session.calls[0].ended_s, session.ended_s) == (0.5, 2.0, 4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_tokens": None}, "'output_tokens' is empty in 1"),
        ({"output_tokens": -1}, "'output_tokens' holds -1.0"),
        ({"t_rel_s": float("nan")}, "'t_rel_s' holds nan"),
        ({"latency_s": float("inf")}, "'latency_s' holds inf"),
        ({"session": None}, "'session' is empty in 1"),
        ({"step": None}, "'step' is empty in 1"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_column(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = sessions_file(tmp_path, [a_step("s", 0), a_step("s", 1, **change)])
    with pytest.raises(PredictorError, match=message) as caught:
        load_sessions(path)
    assert "sessions.parquet" in str(caught.value)


def test_a_column_of_words_where_numbers_belong_is_refused(tmp_path: Path) -> None:
    path = sessions_file(tmp_path, [a_step("s", 0, input_tokens="many")])
    with pytest.raises(PredictorError, match=r"sessions.parquet: the column 'input_tokens' is String"):
        load_sessions(path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = sessions_file(tmp_path, [a_step("s", 0)])
    pl.read_parquet(path).drop("latency_s").write_parquet(path)
    with pytest.raises(PredictorError, match="no column 'latency_s'"):
        load_sessions(path)


def test_what_is_no_table_or_not_there_or_without_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="cannot be read"):
        load_sessions(tmp_path)
    (tmp_path / "sessions.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(PredictorError, match="cannot be read"):
        load_sessions(tmp_path)
    with pytest.raises(PredictorError, match="no model call"):
        load_sessions(sessions_file(tmp_path, [a_step("s", 0, kind="tool")]))


def test_a_task_is_in_one_split_whatever_the_harness(tmp_path: Path) -> None:
    rows = [a_step(f"{dataset}-{i}", 0, dataset=dataset, task=f"t{i}") for i in range(60) for dataset in ("x", "y")]
    split = {session.session: session.split for session in load_sessions(sessions_file(tmp_path, rows))}
    assert all(split[f"x-{i}"] == split[f"y-{i}"] for i in range(60))
    assert set(split.values()) == {"train", "validation", "test"}


def test_every_moment_of_a_session_is_a_row_with_its_truth(tmp_path: Path) -> None:
    path = sessions_file(tmp_path, [a_step("s", i, output_tokens=10 * (i + 1)) for i in range(3)])
    rows = rows_of(load_sessions(path))
    rows = where(rows, rows.known == "all")
    assert rows.arrived.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert rows.waiting.tolist() == [False, True, False, True, False, True, False]
    assert rows.tables["calls"].target.tolist() == [3, 2, 2, 1, 1, 0, 0]
    assert rows.tables["work"].target.tolist() == [60, 60, 50, 50, 30, 30, 0]
    assert rows.tables["path"].target.tolist() == pytest.approx([6.0, 5.5, 4.0, 3.5, 2.0, 1.5, 0.0])


def test_one_models_part_adds_up_to_the_whole(tmp_path: Path) -> None:
    rows = rows_of(load_sessions(sessions_file(tmp_path, counted_sessions(5))))
    rows = where(rows, rows.known == "all")
    target = rows.tables["calls"].target
    for session in np.unique(rows.session):
        of = rows.session == session
        parts = target[of & (rows.model == "big")] + target[of & (rows.model == "small")]
        assert np.array_equal(parts, target[of & (rows.model == "")])


def test_the_anchor_of_a_training_row_does_not_know_its_own_session(tmp_path: Path) -> None:
    """Of two sessions of a kind, each is expected to go as the other did."""
    steps = [a_step("s0", i, task=None) for i in range(3)] + [a_step("s1", i, task=None) for i in range(30)]
    sessions = load_sessions(sessions_file(tmp_path, steps))
    rows = rows_of(sessions, remembered=("train", "validation", "test"))
    rows = where(rows, rows.known == "all")
    start = rows.arrived == 0
    anchor = dict(zip(rows.session[start], rows.tables["calls"].anchor[start], strict=True))
    assert anchor["s0"] > anchor["s1"]


def test_a_copy_has_seen_less_of_its_kind(tmp_path: Path) -> None:
    rows = rows_of(load_sessions(sessions_file(tmp_path, counted_sessions(40))))
    evidence, start = column(rows, "evidence"), rows.arrived == 0
    assert evidence[start & (rows.known == "few")].max() < evidence[start & (rows.known == "all")].min()
    assert set(rows.tables["calls"].split[rows.known == "few"]) == {"train"}


def test_sessions_without_a_clock_tell_no_path(tmp_path: Path) -> None:
    steps = [a_step("s", i, t_rel_s=None, latency_s=None) for i in range(3)]
    rows = rows_of(load_sessions(sessions_file(tmp_path, steps)))
    assert len(told(rows, "path")) == 0
    assert len(told(rows, "calls")) == len(rows.session)
    assert np.isnan(column(rows, "elapsed")).all()


def test_training_learns_what_the_prompts_tell(tmp_path: Path) -> None:
    """The number of calls can be read off the prompts here; the memory of the kind alone cannot know it."""
    rows = rows_of(load_sessions(sessions_file(tmp_path, counted_sessions(120))))
    heads = train_structure(rows, FitSettings(nets=1, epochs=12, hidden=16, batch=256))
    assert set(heads) == set(SPECS)
    table = rows.tables["calls"]
    asked = table.where((table.split == "test") & (rows.known == "all") & (rows.model == ""))
    median = heads["calls"].quantiles(asked.features, asked.anchor)[:, 3]
    ours = np.abs(median - asked.target).mean()
    memory = np.abs(np.exp(asked.anchor) - 1.0 - asked.target).mean()
    assert ours < 0.6 * memory

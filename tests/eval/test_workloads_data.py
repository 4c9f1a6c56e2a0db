"""Tables that workloads are drawn from: what is read, which part, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from eval.workloads.draft import FLUX, LARGE, SDXL, SMALL
from eval.workloads.image_works import FLOWS, GRAPHS, read_images
from eval.workloads.prompt_rows import PromptRows, read_prompts
from eval.workloads.session_rows import read_sessions
from swarmx.core.engine import profiles
from swarmx.core.errors import ConfigError
from swarmx.neural.splits import split_of

_IDS = [f"p{i}" for i in range(200)]


def _prompts(**changed: Any) -> dict[str, list[Any]]:
    """Two hundred prompts of one category, each answered by two models, in one table."""
    table = {
        "prompt_id": _IDS * 2, "category": ["gsm"] * 400, "text": [f"text of {i}" for i in _IDS] * 2,
        "prompt_tokens": [10 + i for i in range(200)] * 2,
        "model": ["Meta-Llama-3.1-8B-Instruct"] * 200 + ["Meta-Llama-3-70B-Instruct"] * 200,
        "out_tokens": list(range(1, 401)),
    }  # fmt: skip
    return {**table, **changed}


def _written(path: Path, table: dict[str, list[Any]]) -> Path:
    pl.DataFrame(table).write_parquet(path)
    return path


def _texts(rows: PromptRows) -> set[str]:
    return {drawn.text for pool in rows.pools.values() for drawn in pool}


def test_a_role_draws_the_recorded_answer_of_the_model_that_stands_for_the_fleets(tmp_path: Path) -> None:
    rows = read_prompts(_written(tmp_path / "own.parquet", _prompts()), "evaluation")
    small, large = (rows.draw("research/reader", model, np.random.default_rng(1)) for model in (SMALL, LARGE))
    assert (small.data_model, large.data_model) == ("Meta-Llama-3.1-8B-Instruct", "Meta-Llama-3-70B-Instruct")
    assert small.text == large.text
    assert large.work == small.work + 200
    assert not any("gsm on" in note for note in rows.stand_ins)


def test_tuning_and_evaluation_have_no_prompt_in_common(tmp_path: Path) -> None:
    path = _written(tmp_path / "own.parquet", _prompts())
    tuning, evaluation, everything = (
        _texts(read_prompts(path, part)) for part in ("tuning", "evaluation", "everything")
    )  # type: ignore[arg-type]
    assert tuning
    assert evaluation
    assert not tuning & evaluation
    assert evaluation == {f"text of {i}" for i in _IDS if split_of("prompt", i) == "test"}
    assert tuning == {f"text of {i}" for i in _IDS if split_of("prompt", i) == "validation"}
    assert len(everything) == 200


def test_a_folder_with_prompts_and_lengths_reads_as_one_table_does(tmp_path: Path) -> None:
    table = pl.DataFrame(_prompts())
    table.select("prompt_id", "category", "text", "prompt_tokens").unique().write_parquet(tmp_path / "prompts.parquet")
    table.select("prompt_id", "model", "out_tokens").write_parquet(tmp_path / "lengths.parquet")
    one = _written(tmp_path / "own.parquet", _prompts())
    assert read_prompts(tmp_path, "evaluation").pools == read_prompts(one, "evaluation").pools


def test_models_of_the_same_size_stand_in_for_missing_ones_and_are_named(tmp_path: Path) -> None:
    models = ["new-7b"] * 200 + ["closed-thing"] * 200
    rows = read_prompts(_written(tmp_path / "own.parquet", _prompts(model=models)), "everything")
    rng = np.random.default_rng(0)
    assert rows.draw("chat/chat", SMALL, rng).data_model == "new-7b"  # and any category for one that is missing
    assert rows.draw("chat/chat", LARGE, rng).data_model == "closed-thing"
    assert "gsm on llama-3.1-8b: 1 models of its size" in rows.stand_ins
    assert "chat/chat: any category, for want of arena-bench-v1, chatbot-arena" in rows.stand_ins
    assert not any("research/reader" in note for note in rows.stand_ins)


def test_longer_prompts_of_a_category_have_a_greater_hint(tmp_path: Path) -> None:
    pool = read_prompts(_written(tmp_path / "own.parquet", _prompts()), "everything").pools["gsm", SMALL]
    ordered = sorted(pool, key=lambda drawn: drawn.prompt_tokens)
    hints = [drawn.hint for drawn in ordered]
    assert hints == sorted(hints)
    assert np.mean(hints) == pytest.approx(0.0, abs=1e-9)


def test_empty_answers_are_left_out_and_many_are_refused(tmp_path: Path) -> None:
    few = _prompts(out_tokens=[0] * 5 + list(range(6, 401)))
    rows = read_prompts(_written(tmp_path / "few.parquet", few), "everything")
    assert sum(len(pool) for pool in rows.pools.values()) == 395
    many = _prompts(out_tokens=[0] * 40 + list(range(41, 401)))
    with pytest.raises(ConfigError, match="10% of the answers have no tokens"):
        read_prompts(_written(tmp_path / "many.parquet", many), "everything")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out_tokens": [-1] + [5] * 399}, "1 rows have fewer than no tokens.*'p0'"),
        ({"out_tokens": [None] + [5] * 399}, "none given"),
        ({"prompt_tokens": [0] + [5] * 399}, "prompts of no tokens"),
        ({"prompt_tokens": [131_072] + [5] * 399}, "more tokens than a context of 131072"),
        ({"model": [None] + ["a-7b"] * 399}, "no model"),
        ({"text": [None] + ["a"] * 399}, "no text"),
        ({"model": ["small-7b"] * 400}, "no answers of a model that could stand for llama-3.1-70b-fp8"),
        ({key: [] for key in _prompts()}, "no rows"),
    ],
)
def test_prompts_that_cannot_be_are_refused(tmp_path: Path, changed: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(_written(tmp_path / "bad.parquet", _prompts(**changed)), "everything")


def test_missing_files_columns_parts_and_prompts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*prompts\.parquet"):
        read_prompts(tmp_path, "tuning")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "text.parquet", "tuning")
    without = {key: values for key, values in _prompts().items() if key != "category"}
    with pytest.raises(ConfigError, match="lacks the columns category"):
        read_prompts(_written(tmp_path / "own.parquet", without), "tuning")
    with pytest.raises(ConfigError, match="the split is 'all'"):
        read_prompts(_written(tmp_path / "own.parquet", _prompts()), "all")  # type: ignore[arg-type]
    only_train = {key: values[:1] for key, values in _prompts(prompt_id=["p0"] * 400).items()}
    assert split_of("prompt", "p0") == "train"
    with pytest.raises(ConfigError, match="no prompt of the evaluation part"):
        read_prompts(_written(tmp_path / "own.parquet", only_train), "evaluation")
    _written(tmp_path / "prompts.parquet", {k: v[:200] for k, v in _prompts().items()})
    _written(tmp_path / "lengths.parquet", {"prompt_id": ["else"], "model": ["m-7b"], "out_tokens": [3]})
    with pytest.raises(ConfigError, match=r"a prompt that prompts\.parquet lacks.*'else'"):
        read_prompts(tmp_path, "everything")


def _sessions(**changed: Any) -> dict[str, list[Any]]:
    """Sixty sessions of three calls with a tool in between; the number of the session is in its first answer."""
    count, rows = 60, 4
    table = {
        "session": [f"s{i}" for i in range(count) for _ in range(rows)],
        "dataset": ["d"] * count * rows, "domain": ["air"] * count * rows,
        "step": [0, 1, 2, 3] * count, "kind": ["llm", "tool", "llm", "llm"] * count,
        "agent": ["agent", "env", "agent", "agent"] * count, "model": ["m", None, "m", "m"] * count,
        "input_tokens": [v for i in range(count) for v in (1000 + i, None, 1200 + i, 1300 + i)],
        "output_tokens": [v for i in range(count) for v in (i + 1, 150, 20, 30)],
        "latency_s": [1.0, 0.25, 1.0, 1.0] * count,
    }  # fmt: skip
    return {**table, **changed}


def test_a_session_waits_for_its_tools_and_shares_most_of_the_shortest_first_prompt(tmp_path: Path) -> None:
    found = read_sessions(_written(tmp_path / "s.parquet", _sessions()), "everything")
    assert len(found.sessions) == 60
    first, second, third = found.draw(np.random.default_rng(0))
    assert (first.gap_s, second.gap_s, third.gap_s) == (0.0, pytest.approx(0.3), pytest.approx(0.05))
    assert first.shared_tokens == 900
    assert second.drawn.prompt_tokens == first.drawn.prompt_tokens + 200


def test_where_only_the_time_to_the_next_call_is_known_the_answer_is_taken_off(tmp_path: Path) -> None:
    table = _sessions(gap_to_next_s=[5.0, None, 300.0, 0.1] * 60, latency_s=[None] * 240)
    turns = read_sessions(_written(tmp_path / "s.parquet", table), "everything").sessions[0]
    assert turns[1].gap_s == pytest.approx(5.0 - 0.74 - 0.0109)
    assert turns[2].gap_s == 60.0


def test_all_calls_of_a_session_have_one_source_and_answers_to_one_prompt_too(tmp_path: Path) -> None:
    sessions = read_sessions(_written(tmp_path / "s.parquet", _sessions()), "everything").sessions
    assert [{turn.drawn.source for turn in turns} for turns in sessions] == [{i} for i in range(60)]
    pools = read_prompts(_written(tmp_path / "own.parquet", _prompts()), "everything").pools
    small, large = ({d.text: d.source for d in pools["gsm", model]} for model in (SMALL, LARGE))
    assert small == large
    assert len(set(small.values())) == 200


def test_tuning_and_evaluation_have_no_session_in_common(tmp_path: Path) -> None:
    path = _written(tmp_path / "sessions.parquet", _sessions())
    numbers = [
        {turns[0].drawn.work - 1 for turns in read_sessions(tmp_path, part).sessions}  # type: ignore[arg-type]
        for part in ("tuning", "evaluation")
    ]
    assert path.exists()
    assert numbers[0] == {i for i in range(60) if split_of("session", f"s{i}") == "validation"}
    assert numbers[1] == {i for i in range(60) if split_of("session", f"s{i}") == "test"}
    assert not numbers[0] & numbers[1]


def test_sessions_with_a_call_of_no_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    tokens = _sessions()["input_tokens"]
    found = read_sessions(_written(tmp_path / "s.parquet", _sessions(input_tokens=[0, *tokens[1:]])), "everything")
    assert (len(found.sessions), found.left_out) == (59, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_tokens": [0, None, 5, 5] * 60}, "0 sessions of the everything part can be used, 60"),
        ({"input_tokens": [-4, None, 5, 5] * 60}, "60 rows have fewer than no tokens"),
        ({"input_tokens": [200_000, None, 5, 5] * 60}, "more tokens than a context"),
        ({"step": [0, 2, 1, 3] * 60}, "a step that does not rise.*'s0'"),
        ({"t_rel_s": [0.0, 2.0, 1.0, 3.0] * 60}, "a time that is negative or falls"),
        ({"t_rel_s": [-1.0, 2.0, 2.5, 3.0] * 60}, "a time that is negative or falls"),
        ({"latency_s": [-1.0] * 240}, "a negative latency_s"),
        ({"kind": ["llm", "person", "llm", "llm"] * 60}, "neither llm nor tool"),
        ({"kind": ["tool"] * 240}, "no call to a language model"),
        ({key: [] for key in _sessions()}, "no rows"),
    ],
)
def test_sessions_that_cannot_be_are_refused(tmp_path: Path, changed: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sessions(_written(tmp_path / "s.parquet", _sessions(**changed)), "everything")


_GPUS = {"H100": "h100", "A100": "a100", "L40S": "l40s"}


def _flows(folder: Path, seconds: float | None = None) -> Path:
    """Thirty flows on three devices; the work of flow i is 10 + i megapixel-steps, wherever it runs."""
    rows: list[dict[str, Any]] = []
    flows = [f"flux1_dev_{i}" for i in range(15)] + [f"dream_xl_{i}" for i in range(15)]
    for gpu, device in _GPUS.items():
        for i, flow in enumerate(flows):
            profile = profiles()[FLUX if i < 15 else SDXL, device]
            took = profile.call_base_s + (10 + i) * profile.step_base_s if seconds is None else seconds
            for cold in (False, True):
                rows.append({"date": "d", "gpu": gpu, "flow": flow, "test_case": "", "weights_unloaded": cold,
                             "exec_s": took * (5 if cold else 1)})  # fmt: skip
    pl.DataFrame(rows).write_parquet(folder / FLOWS)
    graphs = {"flow": flows, "n_nodes": [9] * 30, "n_edges": [9] * 30, "steps": ["[20]"] * 30,
              "classes": ["KSampler,CheckpointLoaderSimple"] * 30}  # fmt: skip
    pl.DataFrame(graphs).write_csv(folder / GRAPHS)
    return folder


def test_an_image_comes_to_its_measured_time_on_the_device_that_it_was_measured_on(tmp_path: Path) -> None:
    works = read_images(_flows(tmp_path)).works
    assert [each.work for each in works[FLUX]] == sorted([*range(10, 25)] * 3)  # none that loaded its weights
    assert [each.work for each in works[SDXL]] == sorted([*range(25, 40)] * 3)
    assert read_images(tmp_path / FLOWS).works == works


def test_runs_of_one_flow_on_several_devices_are_one_source(tmp_path: Path) -> None:
    drawn = [each for works in read_images(_flows(tmp_path)).works.values() for each in works]
    assert len({each.source for each in drawn}) == 30
    assert len({(each.source, each.work) for each in drawn}) == 30


def test_both_parts_draw_from_all_images_as_nothing_is_learnt_from_them(tmp_path: Path) -> None:
    flows = _flows(tmp_path)
    assert read_images(flows).works[SDXL]
    assert len(read_images(flows).works[SDXL]) == 15 * len(_GPUS)


def test_images_without_a_run_or_with_a_negative_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=FLOWS):
        read_images(tmp_path)
    with pytest.raises(ConfigError, match="a negative exec_s"):
        read_images(_flows(tmp_path, seconds=-1.0))
    with pytest.raises(ConfigError, match="no run that"):
        read_images(_flows(tmp_path, seconds=0.0))

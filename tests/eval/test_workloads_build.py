"""Workloads from data: common random numbers, the cache, and forecasts as a live router would have them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

from eval.workloads.build import Sources, WorkloadSettings, build, data_files, notes
from eval.workloads.draft import Draft, Drawn, Truth, Turn
from eval.workloads.drawing import draw_workflows
from eval.workloads.foreseen import LAG, foresee
from eval.workloads.invented import Inventions
from eval.workloads.plan import Workload, forecast_of
from eval.workloads.summary import summary
from swarmx.core.errors import ConfigError
from swarmx.core.forecast import LEVELS

_SETTINGS = WorkloadSettings(
    mix={"chat": 1.0, "research": 1.0, "sessions": 1.0, "pools": 1.0}, count=60, rate_per_s=2.0, split="everything"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("data")
    count = 40
    kinds = [("gsm", "How many apples are left of", 90), ("arena-bench-v1", "Write an essay about", 700)]
    pl.DataFrame(
        [
            {"prompt_id": f"{category}{i}", "category": category, "text": f"{words} {i}?", "prompt_tokens": 20 + i,
             "model": model, "out_tokens": tokens + 3 * i, "limit": 2048}
            for category, words, tokens in kinds
            for i in range(count)
            for model in ("Meta-Llama-3.1-8B-Instruct", "Meta-Llama-3-70B-Instruct")
        ]
    ).write_parquet(folder / "own.parquet")  # fmt: skip
    pl.DataFrame(
        [
            {"session": f"s{i}", "dataset": "d", "domain": "air", "step": j, "kind": "llm", "agent": "agent",
             "model": "m", "input_tokens": 1000 + 200 * j, "output_tokens": 0 if i == 0 else 20 + i, "text_tail": "Hi."}
            for i in range(8)
            for j in range(4)
        ]
    ).write_parquet(folder / "sessions.parquet")  # fmt: skip
    pl.DataFrame({"timestamp_s": [0.0, 1.0, 1.5, 9.0]}).write_parquet(folder / "trace.parquet")
    return Sources(prompts=folder / "own.parquet", sessions=folder, arrivals=folder / "trace.parquet")


@pytest.fixture(scope="module")
def workload(sources: Sources) -> Workload:
    return build(_SETTINGS, sources, 7)


def test_another_rate_or_arrival_changes_nothing_but_the_times(sources: Sources, workload: Workload) -> None:
    other = build(msgspec.structs.replace(_SETTINGS, rate_per_s=11.0, arrivals="mooncake"), sources, 7)
    assert [(w.workflow_id, w.calls) for w in other.workflows] == [(w.workflow_id, w.calls) for w in workload.workflows]
    assert np.array_equal(other.quantiles, workload.quantiles)
    assert other.workflows[-1].at_s == pytest.approx(60 / 11.0)
    assert workload.workflows[-1].at_s == pytest.approx(30.0)


def test_what_was_stored_is_what_would_be_built(sources: Sources, workload: Workload, tmp_path: Path) -> None:
    for _ in range(2):
        found = build(_SETTINGS, sources, 7, tmp_path)
        assert found.workflows == workload.workflows
        assert np.array_equal(found.quantiles, workload.quantiles)
    assert len(list(tmp_path.iterdir())) == 1
    build(msgspec.structs.replace(_SETTINGS, rate_per_s=5.0), sources, 7, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    build(msgspec.structs.replace(_SETTINGS, vary=0.5), sources, 7, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_store_is_built_again(sources: Sources, workload: Workload, tmp_path: Path) -> None:
    build(_SETTINGS, sources, 7, tmp_path)
    (stored,) = tmp_path.iterdir()
    (stored / "workflows.msgpack").write_bytes(b"\xc1")
    assert build(_SETTINGS, sources, 7, tmp_path).workflows == workload.workflows
    assert len(list(tmp_path.iterdir())) == 1


def test_the_truth_is_a_recorded_length_and_forecasts_tell_long_prompts_from_short(workload: Workload) -> None:
    recorded = {90.0 + 3 * i for i in range(40)} | {700.0 + 3 * i for i in range(40)}
    calls = [c for w in workload.workflows if w.kind == "research" for c in w.calls]
    assert {call.work for call in calls} <= recorded
    late = [c for c in calls if c.forecast > len(workload.quantiles) // 2 and c.role == "synthesis"]
    long = [forecast_of(workload, c).quantile(0.5) for c in late if c.work >= 700.0]
    short = [forecast_of(workload, c).quantile(0.5) for c in late if c.work < 700.0]
    assert np.median(long) > 1.5 * np.median(short)


def test_every_forecast_rises_and_is_finite(workload: Workload) -> None:
    assert workload.quantiles.shape == (workload.calls, len(LEVELS))
    assert np.isfinite(workload.quantiles).all()
    assert (np.diff(workload.quantiles, axis=1) >= 0.0).all()


def test_a_session_that_cannot_be_used_is_noted_and_files_are_named(sources: Sources) -> None:
    assert notes(_SETTINGS, sources)[-1] == "1 sessions with calls of no tokens were left out"
    files = data_files(msgspec.structs.replace(_SETTINGS, arrivals="mooncake"), sources)
    assert [path.name for path in files] == ["own.parquet", "sessions.parquet", "trace.parquet"]


def test_data_that_a_kind_needs_and_nobody_gave_is_asked_for(sources: Sources) -> None:
    with pytest.raises(ConfigError, match="--prompts PATH"):
        build(_SETTINGS, Sources(sessions=sources.sessions), 0)
    with pytest.raises(ConfigError, match="--engine PATH"):
        build(msgspec.structs.replace(_SETTINGS, mix={"media": 1.0}), sources, 0)
    with pytest.raises(ConfigError, match="--arrivals PATH"):
        build(msgspec.structs.replace(_SETTINGS, arrivals="azure_code"), Sources(), 0)
    with pytest.raises(ConfigError, match="no workflow kind 'poems'"):
        build(msgspec.structs.replace(_SETTINGS, mix={"poems": 1.0}), sources, 0)


def test_a_summary_of_recorded_data_has_every_kind(workload: Workload) -> None:
    assert {row["kind"] for row in summary(workload)} == set(_SETTINGS.mix)


class _Constant(Truth):
    """Every answer has 100 tokens, or 900 from the workflow `turns` on."""

    def __init__(self, works: list[int]) -> None:
        self.works = works

    def llm(self, role: str, model: str, rng: np.random.Generator) -> Drawn:
        return Drawn(text="Tell me.", data_model="m", prompt_tokens=5, work=self.works.pop(0), work_limit=4096.0)

    def image(self, model: str, rng: np.random.Generator) -> int:
        return 1

    def session(self, rng: np.random.Generator) -> list[Turn]:
        return []


def _chats(works: list[int]) -> list[Draft]:
    return draw_workflows(_Constant(list(works)), {"chat": 1.0}, len(works), 0, Inventions())


def test_an_outcome_is_learnt_from_after_the_lag_and_not_before() -> None:
    same = [100] * (LAG + 40)
    other = [100] * 20 + [900] * (LAG + 20)
    one, two = foresee(_chats(same)), foresee(_chats(other))
    first_heard = 20 + LAG + 1
    assert np.array_equal(one[:first_heard], two[:first_heard])
    assert (two[first_heard] > one[first_heard]).all()

"""Workloads from data: common random numbers, the cache, and forecasts as a live router would have them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.workloads.build import Sources, WorkloadSettings, build, data_files, notes
from eval.workloads.draft import Draft, Drawn, DrawnImage, Truth, Turn
from eval.workloads.drawing import draw_workflows
from eval.workloads.foreseen import LAG, PAST, foresee, means_of
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
        assert found.role_means == workload.role_means
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


class _Told(Truth):
    """One prompt and one model; the answers have these lengths, one after the other."""

    def __init__(self, works: list[int]) -> None:
        self.works = works

    def llm(self, role: str, model: str, rng: np.random.Generator) -> Drawn:
        return Drawn(text="Tell me.", data_model="m", prompt_tokens=5, work=self.works.pop(0), work_limit=4096.0)

    def image(self, model: str, rng: np.random.Generator) -> DrawnImage:
        return DrawnImage(1)

    def session(self, rng: np.random.Generator) -> list[Turn]:
        return [
            Turn(role="agent", drawn=self.llm("", "", rng), gap_s=0.0, shared="", shared_tokens=0) for _ in range(3)
        ]


def _sessions(works: list[int]) -> list[Draft]:
    """Workflows of three calls each, of which all answers are as long as that."""
    told = _Told([work for work in works for _ in range(3)])
    return draw_workflows(told, {"sessions": 1.0}, len(works), 0, Inventions())


@given(
    st.lists(st.sampled_from([100, 900]), min_size=8, max_size=8),
    st.integers(1, 9),
    st.integers(0, 7),
)
@settings(max_examples=15, deadline=None)
def test_an_answer_teaches_no_workflow_that_came_before_it_can_have_ended(
    works: list[int], lag: int, changed: int
) -> None:
    others = [1000 - work if i == changed else work for i, work in enumerate(works)]
    one, two = (foresee(_sessions(each), lag=lag).reshape(8, 3, -1) for each in (works, others))
    heard_from = changed + lag
    assert np.array_equal(one[:heard_from], two[:heard_from]), "not even the next call of the same workflow"
    if heard_from < len(works):
        assert not np.array_equal(one[heard_from], two[heard_from])


def test_what_ended_before_the_first_workflow_is_known_to_it_and_to_running_means() -> None:
    past = _sessions([900] * 30)
    new, taught = (foresee(_sessions([100] * 2), some)[:, LEVELS.index(0.5)] for some in ([], past))
    assert (taught > 1.5 * new).all()
    assert means_of(past) == {("sessions", "agent", "m"): (90, pytest.approx(900.0))}


def test_the_lag_is_longer_than_any_workflow_takes_at_the_highest_rate_and_less_than_a_run() -> None:
    longest_s, most_per_s, headline = 201.0, 8.0, 5600  # alone on devices of middling speed; 0.85 of capacity
    assert longest_s * most_per_s <= LAG < headline


def test_running_means_begin_with_what_the_forecaster_was_taught(workload: Workload) -> None:
    calls = sum(count for count, _ in workload.role_means.values())
    assert 1 * PAST < calls < 20 * PAST
    count, mean = workload.role_means["research", "writer", "Meta-Llama-3-70B-Instruct"]
    assert count > 50
    assert mean == pytest.approx(758.5, rel=0.05)


def test_workflows_of_one_record_have_one_source_in_every_seed_and_invented_ones_none(
    sources: Sources, workload: Workload
) -> None:
    lengths: dict[tuple[str, int], set[float]] = {}
    for seed in (7, 8):
        for workflow in build(_SETTINGS, sources, seed).workflows:
            if workflow.kind == "pools":
                assert workflow.source is None
                continue
            assert workflow.source is not None
            if workflow.kind != "research":  # its first prompt is one of many
                lengths.setdefault((workflow.kind, workflow.source), set()).add(workflow.calls[0].work)
    assert all(len(works) == 1 for works in lengths.values())
    assert 3 < len([kind for kind, _ in lengths if kind == "sessions"]) <= 7

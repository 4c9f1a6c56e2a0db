"""The toy workload: every kind's shape, without any data."""

from __future__ import annotations

import numpy as np
import pytest

from eval.workloads.invented import INVENTED, Inventions, rows
from eval.workloads.kinds import KINDS
from eval.workloads.plan import BLOCK_TOKENS, PlannedWorkflow, Workload, forecast_of
from eval.workloads.summary import summary
from eval.workloads.toy import toy
from swarmx.core.errors import ConfigError


@pytest.fixture(scope="module")
def workload() -> Workload:
    return toy(400, 5.0, 1)


def _of(workload: Workload, kind: str) -> list[PlannedWorkflow]:
    return [workflow for workflow in workload.workflows if workflow.kind == kind]


def test_every_kind_is_there_and_calls_come_after_earlier_ones(workload: Workload) -> None:
    assert {workflow.kind for workflow in workload.workflows} == set(KINDS)
    for workflow in workload.workflows:
        for place, call in enumerate(workflow.calls):
            assert all(0 <= before < place for before in call.after)
            assert call.work >= 1.0
            assert call.work == int(call.work)
            assert call.work <= call.work_limit
            assert call.gap_s >= 0.0
            if call.kind == "llm":
                assert len(call.blocks) == (call.prompt_tokens + int(call.work)) // BLOCK_TOKENS


def test_workflows_come_in_order_and_rows_of_forecasts_are_their_own(workload: Workload) -> None:
    times = [workflow.at_s for workflow in workload.workflows]
    assert times == sorted(times)
    used = [call.forecast for workflow in workload.workflows for call in workflow.calls]
    assert used == list(range(len(workload.quantiles)))
    for workflow in workload.workflows[:30]:
        for call in workflow.calls:
            assert forecast_of(workload, call).mean > 0.0


def test_rate_and_arrivals_change_nothing_but_the_times(workload: Workload) -> None:
    other = toy(400, 50.0, 1, arrivals="bursty")
    assert [w.calls for w in other.workflows] == [w.calls for w in workload.workflows]
    assert np.array_equal(other.quantiles, workload.quantiles)
    assert [w.at_s for w in other.workflows] != [w.at_s for w in workload.workflows]


def test_a_shorter_workload_is_the_beginning_of_a_longer_one(workload: Workload) -> None:
    short = toy(50, 5.0, 1)
    assert [w.calls for w in short.workflows] == [w.calls for w in workload.workflows[:50]]


def test_another_seed_is_another_workload(workload: Workload) -> None:
    assert [w.calls for w in toy(400, 5.0, 2).workflows] != [w.calls for w in workload.workflows]


def test_coders_and_repairs_read_the_repository_that_their_workflow_shares(workload: Workload) -> None:
    for workflow in _of(workload, "coding"):
        coders = [call for call in workflow.calls if call.role == "coder"]
        assert 2 <= len(coders) <= 6
        assert sum(call.role == "fixer" for call in workflow.calls) <= 3
        assert workflow.calls[-1].role == "answer"
        if len(coders) > 1 and coders[0].prompt_tokens > 2 * BLOCK_TOKENS:
            assert coders[0].blocks[0] == coders[1].blocks[0]


def test_workflows_share_a_roles_system_prompt_and_no_more(workload: Workload) -> None:
    one, other = (set(w.calls[0].blocks) for w in _of(workload, "coding")[:2])
    assert one & other
    assert one - other


def test_a_session_begins_each_prompt_with_the_one_before_and_its_answer(workload: Workload) -> None:
    for workflow in _of(workload, "sessions"):
        for before, call in zip(workflow.calls, workflow.calls[1:], strict=False):
            assert call.blocks[: len(before.blocks)] == before.blocks


def test_research_fans_out_and_joins(workload: Workload) -> None:
    for workflow in _of(workload, "research"):
        joins = [call for call in workflow.calls if call.role == "synthesis"]
        assert 1 <= len(joins) <= 2
        assert 3 <= len(joins[0].after) <= 8
        assert all(workflow.calls[i].role == "reader" for i in joins[0].after)


def test_serial_calls_have_no_prompt_and_tasks_are_foreseen_up_to_noise(workload: Workload) -> None:
    for kind in ("media", "pools"):
        serial = [call for w in _of(workload, kind) for call in w.calls if call.kind == "image"]
        assert all(call.prompt_tokens == 0 and not call.blocks for call in serial)
        known = np.array([forecast_of(workload, call).quantile(0.5) == call.work for call in serial])
        assert known.all() if kind == "media" else known.mean() < 0.5


def test_the_forecasts_know_the_share_that_they_are_told_to() -> None:
    for r2 in (0.2, 0.8):
        (row,) = summary(toy(3000, 5.0, 0, ("chat",), r2=r2))
        assert row["r2"] == pytest.approx(r2, abs=0.06)
        assert row["p90"] == pytest.approx(0.9, abs=0.03)


def test_the_first_prompt_tells_something_of_the_branches() -> None:
    workflows = toy(1500, 5.0, 0, ("coding",)).workflows
    fanout = [sum(call.role == "coder" for call in w.calls) for w in workflows]
    repairs = [sum(call.role == "fixer" for call in w.calls) for w in workflows]
    assert 0.15 < np.corrcoef(fanout, repairs)[0, 1] < 0.6  # both depend on the planner's prompt, in part


def test_less_variation_means_narrower_draws_and_the_same_middle() -> None:
    rng = np.random.default_rng(0)
    for vary, low, high in ((0.5, 3, 5), (1.0, 2, 6), (1.5, 1, 7)):
        drawn = [Inventions(vary=vary).count("coders", rng) for _ in range(2000)]
        assert (min(drawn), max(drawn)) == (low, high)
        assert np.mean(drawn) == pytest.approx(4.0, abs=0.15)
    spreads = [np.std(np.log([Inventions(vary=v).amount("page", rng) for _ in range(2000)])) for v in (0.5, 1.0)]
    assert spreads[1] == pytest.approx(2.0 * spreads[0], rel=0.1)
    with pytest.raises(ConfigError, match="vary is 9"):
        Inventions(vary=9.0)


def test_the_table_of_inventions_has_every_one_with_its_reason() -> None:
    assert [row["name"] for row in rows()] == list(INVENTED)
    assert all(row["why"] and row["at 0.5"] and row["at 1.5"] for row in rows())


def test_a_kind_or_mix_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no workflow kind 'poems'"):
        toy(5, 1.0, 0, ("poems",))
    with pytest.raises(ConfigError, match="make no mix"):
        toy(5, 1.0, 0, {"chat": -1.0})


def test_a_summary_has_a_row_a_kind_with_reuse_where_there_are_prompts(workload: Workload) -> None:
    found = {row["kind"]: row for row in summary(workload)}
    assert set(found) == set(KINDS)
    assert found["sessions"]["reuse"] > found["chat"]["reuse"] > 0.0  # type: ignore[operator]
    assert found["pools"].get("reuse") is None

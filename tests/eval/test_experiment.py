"""The parts of a comparison: jobs and their file, tuning, capacity, the bound, ratios, claims and throughput."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("polars")
pytest.importorskip("matplotlib")

from eval.experiment import claims, plots, throughput, tuning
from eval.experiment.bound import bound_s
from eval.experiment.capacity import bounded
from eval.experiment.compare import ratio, weighted_quantiles
from eval.experiment.contestants import EARLY, OURS, ROLE_MEANS, chosen, contestants
from eval.experiment.grids import GRIDS, Settings, candidates, changed, defaults, dimensions
from eval.experiment.grounds import TUNING_SEED, Content, Grounds, Wanted
from eval.experiment.jobs import BOUND, WARMUP_S, Job, Run, code_of, jain_index, key_of, run_job, warmup_s
from eval.experiment.measures import ALL, missed_of_all, overall, rows_of, without_infinities
from eval.experiment.store import RunFile
from eval.experiment.tuning import Tuned, TunedFile, read_tuned, tune, write_tuned
from eval.result import Row
from eval.workloads.plan import BLOCK_TOKENS
from swarmx.agents.policies import POLICIES, make_policy, parameters_of
from swarmx.core.errors import ConfigError
from tests.eval import sims

GROUNDS = Grounds(fingerprint="toy")
CHAT = {"chat": 1.0}


def job(policy: str = "least_work", *, seed: int = 0, count: int = 40, tuning: bool = False, rate: float = 20.0) -> Job:
    content = Content(tuning=tuning, count=count, seed=seed, mix=CHAT)
    wanted = Wanted(content=content, arrivals="poisson", rate_per_s=rate)
    return Job(workload=wanted, fleet="one_model", policy=policy)


def made(latency_s: Sequence[float | None], *, seed: int = 0, **about: object) -> Run:
    """A run of which only these latencies, of chat, matter."""
    run = Run(
        key="k", code="c", job=job(seed=seed), latency_s={"chat": list(latency_s)}, sources={},
        max_slowdown={"chat": 1.0}, jain_slowdown={"chat": 1.0}, thirds={"chat": [1.0, 1.0, 1.0]}, jain=1.0, cost=1.0,
        hit_ratio=0.0, preemptions=0, unended=0, refusals=0, span_s=10.0, drained_s=1.0, calls=1, cpu_s=1.0,
    )  # fmt: skip
    return msgspec.structs.replace(run, **about)


def test_a_job_gives_the_same_run_again_but_for_the_time_it_took() -> None:
    one, two = (msgspec.structs.replace(run_job(job(), GROUNDS), cpu_s=0.0) for _ in range(2))
    assert one == two
    assert len(one.latency_s["chat"]) == 40


@pytest.mark.parametrize("policy", ["least_work", BOUND])
def test_what_arrives_before_the_warm_up_has_passed_is_run_and_not_counted(policy: str) -> None:
    whole = run_job(job(policy), GROUNDS)
    times_s = [workflow.at_s for workflow in GROUNDS.build(whole.job.workload).workflows]
    run = run_job(msgspec.structs.replace(job(policy), warmup_s=1.0), GROUNDS)
    counted = [latency for latency, at_s in zip(whole.latency_s["chat"], times_s, strict=True) if at_s >= 1.0]
    assert run.latency_s["chat"] == counted
    assert 0 < len(counted) < len(times_s)
    assert run.span_s == pytest.approx(times_s[-1] - 1.0)
    (row, _) = rows_of(run, {"experiment": "routing"}, {"chat": 2.0}, 2.0)
    assert row["warmup_s"] == 1.0
    with pytest.raises(ConfigError, match="nothing arrives after the warm-up of 50 s"):
        run_job(msgspec.structs.replace(job(policy), warmup_s=50.0), GROUNDS)


def test_the_warm_up_is_a_time_whatever_the_load_and_short_in_a_short_run() -> None:
    long = [job(rate=rate, count=5600).workload for rate in (5.0, 7.0)]
    assert [warmup_s(wanted) for wanted in long] == [WARMUP_S, WARMUP_S]
    assert warmup_s(job(rate=20.0, count=40).workload) == pytest.approx(0.2)


def test_policies_see_the_same_arrivals_and_tuning_others() -> None:
    kept = [GROUNDS.build(job(policy).workload).workflows for policy in ("random", "least_work")]
    assert kept[0] == kept[1]
    other = GROUNDS.build(job(seed=TUNING_SEED, tuning=True).workload).workflows
    assert [w.at_s for w in other] != [w.at_s for w in kept[0]]


def test_only_what_is_submitted_until_then_is_run() -> None:
    wanted = job().workload
    whole = GROUNDS.build(wanted)
    cut = GROUNDS.build(msgspec.structs.replace(wanted, until_s=1.0))
    assert list(cut.workflows) == [w for w in whole.workflows if w.at_s <= 1.0]
    assert 0 < len(cut.workflows) < len(whole.workflows)


def test_the_key_of_a_job_changes_with_each_setting_and_with_the_data() -> None:
    base = job()
    others = [
        msgspec.structs.replace(base, late_binding=False),
        msgspec.structs.replace(base, parameters={"x": 1.0}),
        msgspec.structs.replace(base, targets={"chat": 1.0}),
        job(seed=1),
    ]
    keys = {key_of(each, GROUNDS) for each in [base, *others]} | {key_of(base, Grounds(fingerprint="other"))}
    assert len(keys) == 6


def test_the_code_of_one_policy_is_not_that_of_another() -> None:
    assert code_of("random") != code_of("least_work")
    assert code_of("random") == code_of("random")


def test_runs_in_the_file_are_found_and_a_line_that_was_cut_off_is_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    kept = RunFile(path)
    jobs = [job(seed=seed) for seed in range(3)]
    for each in jobs[:2]:
        kept.add(run_job(each, GROUNDS))
    path.write_bytes(path.read_bytes()[:-20])
    again = RunFile(path)
    assert again.missing(jobs, GROUNDS) == jobs[1:]
    again.add(run_job(jobs[1], GROUNDS))
    assert RunFile(path).missing(jobs, GROUNDS) == jobs[2:]


def test_runs_of_other_code_are_left_unless_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RunFile(path).add(msgspec.structs.replace(run_job(job(), GROUNDS), code="old"))
    assert RunFile(path).get(job(), GROUNDS) is None
    assert RunFile(path).stale == 1
    assert RunFile(path, any_code=True).get(job(), GROUNDS) is not None


@pytest.mark.parametrize("policy", POLICIES)
def test_every_value_of_a_grid_is_one_that_the_policy_takes(policy: str) -> None:
    for dimension in dimensions(policy):
        for change in dimension:
            make_policy(policy, changed(defaults(policy), change).parameters)


def test_ours_is_searched_no_longer_than_the_baseline_with_the_largest_grid() -> None:
    assert candidates(OURS) <= max(candidates(policy) for policy in GRIDS if policy != OURS)


def test_all_policies_take_part_with_the_information_of_their_originals() -> None:
    known = contestants()
    assert {each.policy for each in known.values()} == {*POLICIES, BOUND}
    assert known["round_robin"].forecast == known["murakkab_mean"].forecast == "role_means"
    assert known["swarmx_paper"].forecast == known["gittins"].forecast == "neural"
    assert [each.name for each in chosen(["ours"], known)] == [OURS, ROLE_MEANS]
    with pytest.raises(ConfigError, match=r"round_robbin.*round_robin"):
        chosen(["round_robbin"], known)


def test_an_ablation_takes_one_ingredient_away_and_is_left_out_where_there_is_none() -> None:
    known = contestants()
    tuned = Settings(parameters=parameters_of(OURS) | {"siblings": 0.0})
    without = known[f"{OURS}/no_hold"].settled(tuned)
    assert without is not None
    assert without.parameters == tuned.parameters | {"hold": 0.0}
    assert known[f"{OURS}/no_siblings"].settled(tuned) is None
    assert known[EARLY].settled(msgspec.structs.replace(tuned, late_binding=False)) is None


def test_who_knows_role_means_only_hears_means_of_paths_too() -> None:
    neural = Settings(path="neural")
    assert contestants()[ROLE_MEANS].allowed(neural).path == "means"
    assert contestants()[OURS].allowed(neural).path == "neural"


def test_tuning_keeps_the_settings_with_the_lowest_p99_and_counts_what_it_tried() -> None:
    known = contestants()
    asked: list[Job] = []

    def jobs(each: object, settings: Settings, fleet: str, load: float) -> list[Job]:
        parameters = settings.parameters
        return [msgspec.structs.replace(job(tuning=True), parameters=parameters, late_binding=settings.late_binding)]

    def run(some: Sequence[Job], what: str) -> list[Run]:
        asked.extend(some)
        return [
            msgspec.structs.replace(made([abs(each.parameters["batch"] - 60.0) + each.late_binding + 1.0]), job=each)
            for each in some
        ]

    (found,) = tune([known["speed_edf"]], [("one_model", 0.7)], jobs, run)
    assert found.settings.parameters["batch"] == 64.0
    assert not found.settings.late_binding
    assert found.searched == len(asked) == candidates("speed_edf")
    assert found.score == pytest.approx(5.0)


def test_the_best_baseline_is_the_one_of_the_tuning_split_and_never_ours(tmp_path: Path) -> None:
    def tuned(name: str, score: float | None) -> Tuned:
        return Tuned(fleet="f", load=0.7, contestant=name, settings=Settings(), score=score, searched=1)

    some = [tuned("random", 3.0), tuned("round_robin", 2.0), tuned(OURS, 1.0), tuned("least_work", None)]
    file = TunedFile(workload="toy", command="", tuned=some)
    everyone = list(contestants().values())
    assert file.best("f", 0.7, everyone) == "round_robin"
    assert file.best("f", 0.85, everyone) == "round_robin", "the nearest load that was tuned"
    assert file.best("g", 0.7, everyone) is None
    assert file.best("f", 0.7, [each for each in everyone if each.name == "random"]) == "random"
    write_tuned(tmp_path / "tuned.json", file)
    assert read_tuned(tmp_path / "tuned.json") == file
    with pytest.raises(ConfigError, match="nothing was tuned"):
        file.settings("random", "g", 0.7)


@pytest.mark.parametrize("fleet", ["heterogeneous", "homogeneous"])
def test_every_baseline_has_settings_that_were_found_and_that_it_understands(fleet: str) -> None:
    file = read_tuned(Path(tuning.__file__).parent / "tuned.json")
    mine = [each for each in contestants().values() if each.group == "baselines" and each.like is None]
    for each in mine:
        make_policy(each.policy, file.settings(each.name, fleet, 0.85).parameters)
    assert file.best(fleet, 0.85, mine) is not None


@pytest.mark.parametrize("text", ["", "{}", "nonsense"])
def test_a_tuned_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"no tuned\.json"):
        read_tuned(path)


def test_queues_are_bounded_unless_the_last_third_is_slower_or_something_is_left() -> None:
    assert bounded(made([1.0]))
    assert not bounded(made([1.0], thirds={"chat": [1.0, 1.0, 1.0], "coding": [1.0, 1.0, 1.3]}))
    assert not bounded(made([1.0], drained_s=1000.0))
    assert not bounded(made([1.0], unended=1))


def test_nobody_is_faster_than_the_bound() -> None:
    asked = msgspec.structs.replace(job("least_work", rate=2.0), forecast="oracle")
    least = run_job(msgspec.structs.replace(asked, policy=BOUND), GROUNDS).latency_s["chat"]
    came = run_job(asked, GROUNDS).latency_s["chat"]
    assert all(a is not None and b is not None and a <= b for a, b in zip(least, came, strict=True))


def test_the_bound_takes_a_prefix_as_cached_only_where_another_call_has_it() -> None:
    shared, own = sims.call(prompt_tokens=BLOCK_TOKENS, blocks=(1,)), sims.call(prompt_tokens=BLOCK_TOKENS, blocks=(2,))
    workload = sims.workload([(0.0, [shared]), (1.0, [shared]), (2.0, [own])])
    seconds = bound_s(workload, sims.replicas(1))
    assert seconds[0] == seconds[1] < seconds[2]
    assert seconds[2] == pytest.approx(sims.LLM.alone_s(BLOCK_TOKENS, 50.0))


def test_jains_index_is_one_when_all_are_alike_and_one_nth_when_one_has_all() -> None:
    assert jain_index(np.array([2.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert jain_index(np.array([0.0, 0.0, 5.0])) == pytest.approx(1.0 / 3.0)


def test_a_refused_workflow_is_a_miss_and_makes_a_quantile_infinite() -> None:
    run = made([1.0, 2.0, None, 3.0])
    assert missed_of_all(run, {"chat": 2.5}) == 0.5
    assert overall(run, 0.99) == math.inf
    rows = [without_infinities(row) for row in rows_of(run, {"experiment": "routing"}, {"chat": 2.0}, 2.0)]
    assert [row["kind"] for row in rows] == ["chat", ALL]
    assert rows[0]["p99_s"] is None
    assert (rows[0]["miss"], rows[0]["miss_1.5x"], rows[0]["miss_3x"]) == (0.5, 0.75, 0.25)
    assert rows[0]["goodput"] == pytest.approx(0.2)


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_interval_of_a_ratio_is_the_same_each_time_and_holds_its_median(seeds: int) -> None:
    rng = np.random.default_rng(0)
    ours = [made((1.0 + rng.random(200)).tolist(), seed=seed) for seed in range(seeds)]
    theirs = [made((2.0 + rng.random(200)).tolist(), seed=seed) for seed in range(seeds)]
    found = ratio(ours, theirs)
    assert found == ratio(ours, theirs)
    assert found.low <= found.value <= found.high < 1.0
    assert found.over == ("seeds and records" if seeds >= 4 else "records")
    assert found.clusters == 200 * seeds, "invented workflows are all by themselves"


def replayed(records: int, seeds: int, *, known: bool) -> tuple[list[Run], list[Run]]:
    """Two contestants on 400 workflows a seed that replay so many records, of which half are slower with ours; whether
    it is `known` who replays what."""
    ours, theirs = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        which = rng.integers(records, size=400)
        base_s = 10.0 + which + 0.01 * rng.random(400)
        about = {"sources": {"chat": which.tolist()}} if known else {}
        ours.append(made((base_s * np.where(which % 2, 1.3, 0.7)).tolist(), seed=seed, **about))
        theirs.append(made(base_s.tolist(), seed=seed, **about))
    return ours, theirs


@pytest.mark.parametrize("seeds", [2, 5])
def test_workflows_that_replay_the_same_records_are_no_evidence_of_their_own(seeds: int) -> None:
    as_if_new, honest = (ratio(*replayed(12, seeds, known=known)) for known in (False, True))
    assert (as_if_new.clusters, honest.clusters) == (400 * seeds, 12)
    assert honest.value == as_if_new.value
    assert honest.high - honest.low > 3.0 * (as_if_new.high - as_if_new.low)


def test_more_seeds_of_the_same_records_tell_nothing_about_other_records() -> None:
    few, many = (ratio(*replayed(12, seeds, known=True)) for seeds in (4, 16))
    assert many.high - many.low > 0.6 * (few.high - few.low)


def test_a_row_says_how_many_records_its_workflows_were_drawn_from() -> None:
    run = made([1.0, 2.0, 3.0, 4.0], sources={"chat": [7, 7, 2, 7]})
    assert [row["clusters"] for row in rows_of(run, {}, {"chat": 2.0}, 2.0)] == [2, 2]
    assert [row["clusters"] for row in rows_of(made([1.0, 2.0]), {}, {"chat": 2.0}, 2.0)] == [2, 2]


@given(
    st.lists(st.tuples(st.floats(0.1, 9.0), st.integers(0, 3)), min_size=1, max_size=30), st.sampled_from([0.5, 0.99])
)
def test_a_weighted_quantile_is_that_of_the_values_repeated(pairs: list[tuple[float, int]], level: float) -> None:
    values, weights = np.array([value for value, _ in pairs]), np.array([weight for _, weight in pairs])
    repeated = np.repeat(values, weights if weights.any() else 1)
    (found,) = weighted_quantiles(values, weights[None, :], level)
    assert found == np.quantile(repeated, level, method="higher")


def test_runs_of_different_arrivals_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="same workloads"):
        ratio([made([1.0], seed=0)], [made([1.0], seed=1)])


def row(policy: str, p99_s: float, *, kind: str = ALL, seed: int = 0, load: float = 0.7, **about: float) -> Row:
    place = {"experiment": "routing", "fleet": "heterogeneous", "load": load, "arrivals": "poisson"}
    return {**place, "policy": policy, "kind": kind, "seed": seed, "p99_s": p99_s, "p50_s": p99_s / 2.0, **about}


def test_claims_are_medians_over_seeds_of_paired_ratios() -> None:
    rows = [
        *(row(OURS, value, seed=seed) for seed, value in enumerate((8.0, 9.0, 30.0))),
        *(row("least_work", value, seed=seed) for seed, value in enumerate((10.0, 10.0, 10.0))),
        *(row("random", 1.0, seed=seed) for seed in range(3)),
        row(OURS, 5.0, kind="chat"),
        row("least_work", 4.0, kind="chat"),
    ]
    found = {each.name: each for each in claims.claims_of(rows, {("heterogeneous", 0.7): "least_work"})}
    at = "@heterogeneous,0.7,poisson"
    assert found[f"p99_vs_best_baseline{at}"].value == pytest.approx(0.9)
    assert found[f"p99_vs_best_baseline{at}"].met
    assert found[f"p99_vs_best_baseline{at}"].aim == 0.90
    assert found[f"p99_worst_kind{at}"].value == pytest.approx(1.25)
    assert not found[f"p99_worst_kind{at}"].met
    assert found[f"p50_vs_best_baseline{at}"].value == pytest.approx(0.9)


def test_the_gap_to_perfect_lengths_is_only_closed_where_there_is_one() -> None:
    wide = [row(ROLE_MEANS, 10.0), row(OURS, 9.25), row("marginal/lengths", 9.0), row("oracle", 8.5)]
    found = {each.name.split("@")[0]: each.value for each in claims.claims_of(wide, {})}
    assert found["gap_closed"] == pytest.approx(0.75)
    assert found["learning_gain_p99"] == pytest.approx(0.925)
    assert found["oracle_distance"] == pytest.approx(9.25 / 8.5)
    narrow = [row(ROLE_MEANS, 10.0), row(OURS, 9.95), row("marginal/lengths", 9.9)]
    assert not any(each.name.startswith("gap_closed") for each in claims.claims_of(narrow, {}))
    (said,) = claims.gap_rows(narrow)
    assert said["gap"] == pytest.approx(0.01)
    assert said["gap_closed"] is None


LIMITS = {OURS: 0.8, "power_of_two": 0.4, "random": 0.0}
"""The load up to which each keeps its misses low; above it all are missed."""


def run_within_limits(jobs: Sequence[Job], what: str) -> list[Run]:
    return [made([9.0 if each.workload.rate_per_s > LIMITS[each.policy] else 1.0] * 50) for each in jobs]


def jobs_at(each: throughput.Search, load: float) -> list[Job]:
    return [job(each.contestant, rate=load)]


def searches() -> list[throughput.Search]:
    return [throughput.Search(contestant=name, fleet="f", arrivals="poisson") for name in LIMITS]


def test_throughput_is_the_highest_load_with_few_misses() -> None:
    some = searches()
    throughput.search(some, jobs_at, {"f": {"chat": 5.0}}, run_within_limits)
    rows = list(throughput.rows_of(some, {"f": 10.0}, "toy"))
    assert [r["load"] for r in rows[:2]] == pytest.approx([0.8, 0.4], abs=0.02)
    assert [r["fails_at"] for r in rows] == pytest.approx([0.8, 0.4, 0.05], abs=0.02)
    assert rows[2]["load"] is None
    found = {each.name: each.value for each in throughput.claims_of(rows, ["power_of_two", "random"])}
    assert found["throughput_at_slo_vs_best_baseline@f,poisson"] == pytest.approx(2.0, abs=0.1)
    assert found["throughput_at_slo_vs_power_of_two@f,poisson"] == pytest.approx(2.0, abs=0.1)


def test_a_search_begins_with_the_loads_of_the_matrix_and_leaves_out_what_they_decide() -> None:
    asked: dict[str, list[float]] = {name: [] for name in LIMITS}

    def run(jobs: Sequence[Job], what: str) -> list[Run]:
        for each in jobs:
            asked[each.policy].append(each.workload.rate_per_s)
        return run_within_limits(jobs, what)

    some = searches()
    throughput.search(some, jobs_at, {"f": {"chat": 5.0}}, run, first=(0.7, 0.85))
    assert [each.low for each in some] == pytest.approx([0.8, 0.4, throughput.LOW], abs=0.02)
    assert [each.load is None for each in some] == [False, False, True]
    assert asked[OURS][:2] == [0.7, 0.85]
    assert all(0.7 < load < 0.85 for load in asked[OURS][2:])
    assert asked["power_of_two"][0] == 0.7
    assert max(asked["power_of_two"][1:]) < 0.7


def test_every_baseline_near_the_best_is_searched_and_three_in_any_case() -> None:
    misses = {"a": 0.02, "b": 0.05, "c": 0.3, "d": 0.06, "e": 0.061}
    assert throughput.contenders(misses) == ["a", "b", "d"]
    assert throughput.contenders(misses | {"a": 0.021}) == ["a", "b", "d", "e"]
    assert throughput.contenders({"a": 0.0, "b": 0.5, "c": 0.9, "d": 0.8}) == ["a", "b", "d"]
    assert throughput.contenders({"a": 0.0}) == ["a"]


def searched(policy: str, load: float | None, fails_at: float | None, **about: float) -> Row:
    place = {"experiment": "routing_throughput", "fleet": "f", "arrivals": "poisson"}
    return {**place, "policy": policy, "misses": throughput.MISSES, "load": load, "fails_at": fails_at, **about}


def test_ours_is_held_against_round_robin_at_its_last_good_load_and_nowhere_where_it_has_none() -> None:
    good = searched("round_robin", 0.62, 0.63, misses=throughput.FAILING, p99_vs_round_robin=0.3)
    (found,) = throughput.claims_of([good], ["round_robin"])
    assert (found.name, found.value, found.met) == ("p99_vs_round_robin@f,0.62,poisson", 0.3, True)
    assert not list(throughput.claims_of([searched("round_robin", None, 0.07, misses=0.1)], ["round_robin"]))


def test_a_baseline_that_fails_at_every_load_counts_with_the_lowest_and_ours_is_not_claimed_then() -> None:
    bad = searched("power_of_two", None, 0.1)
    found = {each.name: each.value for each in throughput.claims_of([searched(OURS, 0.8, 0.81), bad], ["power_of_two"])}
    assert found == {
        "throughput_at_slo_vs_best_baseline@f,poisson": pytest.approx(8.0),
        "throughput_at_slo_vs_power_of_two@f,poisson": pytest.approx(8.0),
    }
    assert not list(throughput.claims_of([searched(OURS, None, 0.1), bad], ["power_of_two"]))


def test_p99_is_drawn_against_load_where_there_are_several(tmp_path: Path) -> None:
    rows = [row(OURS, 10.0 * load, load=load, seed=seed) for load in (0.5, 0.7) for seed in range(2)]
    assert not plots.p99_by_load(rows[:2], [OURS], "title", tmp_path / "one.png")
    assert plots.p99_by_load(rows, [OURS, "least_work"], "title", tmp_path / "two.png")
    assert [path.name for path in tmp_path.iterdir()] == ["two.png"]


def test_kinds_without_data_are_left_out_and_said(tmp_path: Path) -> None:
    from eval.workloads.reading import Sources

    given = Grounds(sources=Sources(prompts=tmp_path))
    assert set(given.mix("heterogeneous")) == {"chat", "coding", "research", "pools"}
    assert set(given.mix("one_model")) == {"chat"}
    with pytest.raises(ConfigError, match="sessions needs --sessions"):
        given.mix("one_model", ["sessions"])
    with pytest.raises(ConfigError, match="no workflow kind 'chats'"):
        given.mix("one_model", ["chats"])

"""The comparison of length forecasts on data made here: end to end, what it may see, and its scores."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pl = pytest.importorskip("polars")
pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("lightgbm")
pytest.importorskip("xgboost")
pytest.importorskip("sklearn")

from eval import predictor  # noqa: E402
from eval.__main__ import experiments, main  # noqa: E402
from eval.baselines.columns import Ground, Prompts  # noqa: E402
from eval.baselines.empirical import Grouping, Histogram, capped, grouped, histogram  # noqa: E402
from eval.baselines.suite import indices, rehearsal  # noqa: E402
from eval.length_scores import ratio_interval, scores, tau  # noqa: E402
from eval.splits import split_of  # noqa: E402
from swarmx.core.errors import PredictorError  # noqa: E402
from swarmx.core.forecast import LEVELS  # noqa: E402
from swarmx.neural.training.lengths import Lengths, read_lengths  # noqa: E402

WORDS = ("name", "list", "tell", "draw")
PROMPTS, MODELS = 160, 12


def write(folder: Path, prefix: str, prompts: int, suffix: str = "") -> Path:
    """Prompts whose first word says how long the answers are; each model has its own factor."""
    rng = np.random.default_rng(len(prefix))
    asked = [
        {
            "prompt_id": f"{prefix}{i}",
            "category": "even" if i % 2 == 0 else "odd",
            "text": f"{WORDS[i % 4]} {prefix} of {' '.join(rng.choice(['salt', 'rain', 'iron', 'wool'], 6))}",
        }
        for i in range(prompts)
    ]
    answers = [
        {
            "prompt_id": p["prompt_id"],
            "model": f"m{m}",
            "out_tokens": round(30 * 2 ** (i % 4) * (1 + m / 6) * float(rng.uniform(1, 1.5))),
            "limit": 4096 if m % 2 else None,
        }
        for i, p in enumerate(asked)
        for m in range(MODELS)
    ]
    folder.mkdir()
    pl.DataFrame(asked).write_parquet(folder / f"prompts{suffix}.parquet")
    pl.DataFrame(answers).write_parquet(folder / f"lengths{suffix}.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("predictor") / "prompts", "what", PROMPTS)


@pytest.fixture(scope="module")
def lengths(folder: Path) -> Lengths:
    return read_lengths(folder, 10)


def test_a_quick_comparison_writes_rows_claims_and_plots(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", "else", 90, suffix="_elsewhere")
    out = tmp_path / "out"
    arguments = ["--prompts", str(folder), "--quick", "--out", str(out), "--extra", str(other)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "_shipped", lambda weights: None)  # theirs have another width than --quick
        assert main(["predictor", *arguments]) == 0
    result = json.loads((out / "result.json").read_bytes())
    whole = [r for r in result["rows"] if r.get("part") == "all"]
    regimes = {row["regime"] for row in whole}
    assert regimes == {
        "unseen_prompts", "unseen_models_cold", "unseen_models_50", "extra:other_cold", "extra:other_50",
    }  # fmt: skip
    loss = {row["method"]: row["pinball"] for row in whole if row["regime"] == "unseen_prompts"}
    assert {"swarmx", "global", "per_model_category", "histogram_by_model", "linear_svd+effect", "lightgbm_svd",
            "lightgbm_embedding_oof", "xgboost_svd+effect", "oracle_other_answers"} <= loss.keys()  # fmt: skip
    assert loss["oracle_other_answers"] < loss["per_model"] < loss["global"]
    assert loss["lightgbm_svd"] < loss["global"]
    names = {made["name"] for made in result["claims"]}
    assert {"pinball_vs_best_non_neural@unseen_prompts", "kendall_tau_gain@unseen_models_50",
            "coverage_error_points@99"} <= names  # fmt: skip
    assert len(result["meta"]["data_files"]) == 4
    assert (out / "pinball.png").stat().st_size > 1000
    assert (out / "calibration.png").stat().st_size > 1000


def test_strangers_are_test_models_with_fifty_answers_to_train_prompts(lengths: Lengths) -> None:
    drawn = predictor._drawn(lengths, indices(lengths, "train", "test"), np.random.default_rng(0))
    models, counts = np.unique(lengths.model[drawn], return_counts=True)
    assert models.tolist() == sorted(f"m{m}" for m in range(MODELS) if split_of("model", f"m{m}") == "test")
    assert set(counts.tolist()) == {50}
    assert set(lengths.prompt_split[lengths.prompt[drawn]]) == {"train"}


def test_settings_are_chosen_without_test_rows(lengths: Lengths) -> None:
    for few in ("all", "none", "50"):
        known, asked, strange = rehearsal(lengths, few)
        assert set(lengths.prompt_split[lengths.prompt[known]]) == {"train"}
        assert set(lengths.prompt_split[lengths.prompt[asked]]) == {"validation"}
        assert "test" not in lengths.model_split[np.concatenate([known, asked])]
        seen = np.isin(lengths.model[known], lengths.model[strange])
        assert (seen.sum() == 0) == (few != "50")


def _prompts(lengths: Lengths) -> Prompts:
    words = np.array([[text.startswith(word) for word in WORDS] for text in lengths.texts], dtype=np.float64)
    return Prompts({"svd+effect": words}, words @ words.T)


def test_encodings_of_a_train_row_do_not_know_its_own_prompt(lengths: Lengths) -> None:
    known = indices(lengths, "train", "train")
    spoilt = _stretched(lengths, int(lengths.prompt[known[0]]))
    grounds = [Ground(each, _prompts(each), None, "svd+effect", known) for each in (lengths, spoilt)]  # type: ignore[arg-type]
    anchors = [design.anchor[design.weight == 1.0] for design in (ground.train() for ground in grounds)]
    fold = grounds[0].fold
    order = np.concatenate([known[fold[lengths.prompt[known]] == f] for f in range(fold.max() + 1)])
    mine = lengths.prompt[order] == lengths.prompt[known[0]]
    moved = np.abs(anchors[0] - anchors[1])[mine]
    assert len(moved) > 0
    # What is left comes by way of the other prompts, whose effects it was part of.
    assert moved.max() < 0.05 * np.log(1000.0)


def _stretched(lengths: Lengths, prompt: int) -> Lengths:
    """The same with a thousand times the tokens for one prompt."""
    return replace(lengths, tokens=np.where(lengths.prompt == prompt, 1000.0 * lengths.tokens, lengths.tokens))


def test_a_model_never_seen_gets_the_quantiles_of_its_parent(lengths: Lengths) -> None:
    known, asked = indices(lengths, "train", "train"), indices(lengths, "test", "test")
    everybody = grouped(lengths, known, asked, Grouping(""))
    assert np.allclose(grouped(lengths, known, asked, Grouping("model", 5.0)), everybody)
    by_category = grouped(lengths, known, asked, Grouping("category", 5.0))
    both = grouped(lengths, known, asked, Grouping("model_category", 0.0, "category"))
    assert np.allclose(both, by_category)
    assert not np.allclose(by_category, everybody)


def test_quantiles_of_a_histogram_rise_and_lie_within_a_bin_of_the_empirical_ones(lengths: Lengths) -> None:
    known, asked = indices(lengths, "train", "train"), indices(lengths, "test", "train")
    q = histogram(lengths, known, asked, Histogram(False, 10**6, 4, 1))
    assert (np.diff(q, axis=1) >= 0.0).all()
    plain = grouped(lengths, known, asked, Grouping(""))
    assert np.abs(np.log2(np.median(q, axis=0) / plain[0])).max() < 0.6


def test_no_forecast_exceeds_the_limit_of_its_call(lengths: Lengths) -> None:
    rows = np.arange(24)
    q = capped(lengths, rows, np.full((24, len(LEVELS)), 1e6))
    assert set(q[:, 0]) == {4096.0, 1e6}


def test_perfect_quantiles_are_calibrated_and_ranked(lengths: Lengths) -> None:
    rows = indices(lengths, "train", "train")
    near = lengths.tokens[rows, None] * np.linspace(0.8, 1.2, len(LEVELS))
    found = scores(lengths, rows, near)
    assert found["kendall_tau"] > 0.9
    assert found["central_50"] == 1.0
    assert tau(np.ones(5), np.arange(5.0)) == 0.0


def test_the_interval_of_equal_losses_is_one() -> None:
    losses = np.random.default_rng(0).uniform(1, 2, 50)
    assert ratio_interval(losses, losses, np.arange(50) // 5) == (1.0, 1.0, 1.0)


def test_a_folder_without_lengths_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match=r"holds 0 files prompts_\*\.parquet"):
        predictor.files_of(tmp_path)


def test_every_experiment_is_listed_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    known = experiments()
    assert {"predictor", "decision", "fit.lengths"} <= known.keys()
    assert all(text and not text.startswith("python") for text in known.values())
    assert main(["nothing"]) == 2
    said = capsys.readouterr().err
    assert "There is no experiment 'nothing'." in said
    assert known["predictor"] in said


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))

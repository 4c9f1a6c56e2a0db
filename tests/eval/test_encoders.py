"""The sweep of encoders on data made here: what it reads, that it leaks nothing, and where it sees the knee."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

pl = pytest.importorskip("polars")
pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from eval.encoder_head import Downstream, read_lengths  # noqa: E402
from eval.encoders import cpu_ms, entries, knee, lessons_of, measure, plot  # noqa: E402
from eval.splits import split_of  # noqa: E402

WORDS = ("name", "list", "tell", "draw")  # of equal length: only the word itself gives it away


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 prompts of two sources whose first word says how long the answers of six models are."""
    folder = tmp_path_factory.mktemp("prompts")
    rng = np.random.default_rng(0)
    asked = [
        {
            "prompt_id": f"p{i}",
            "source": "zeroeval/gsm" if i % 2 else "arena-bench-v1",
            "text": f"{WORDS[i % 4]} what comes of {' '.join(rng.choice(['salt', 'rain', 'iron', 'wool'], 6))}",
        }
        for i in range(240)
    ]
    answers = [
        {
            "prompt_id": p["prompt_id"],
            "model": f"m{m}",
            "out_tokens": round(50 * 2 ** (i % 4) * float(rng.uniform(1, 2))),
        }
        for i, p in enumerate(asked)
        for m in range(6)
    ]
    answers.append({"prompt_id": "p0", "model": "m0", "out_tokens": 0})
    pl.DataFrame(asked).write_parquet(folder / "prompts.parquet")
    pl.DataFrame(answers).write_parquet(folder / "lengths.parquet")
    return folder


@pytest.fixture(scope="module")
def down(prompts: Path) -> Downstream:
    return Downstream(read_lengths(prompts))


def test_prompts_are_split_by_the_frozen_hash_and_empty_answers_left_out(prompts: Path) -> None:
    data = read_lengths(prompts)
    ids = sorted(f"p{i}" for i in range(240))
    assert data.split.tolist() == [split_of("prompt", key) for key in ids]
    assert (data.tokens > 0).all()
    kept = [m for m in range(6) if split_of("model", f"m{m}") != "test"]
    assert len(data.tokens) == 240 * len(kept)


def test_a_quick_look_takes_fewer_prompts(prompts: Path) -> None:
    assert len(read_lengths(prompts, most_prompts=60).prompts) == 60


def test_nothing_is_learnt_from_validation_or_test_prompts(prompts: Path) -> None:
    data = read_lengths(prompts)
    spoilt = read_lengths(prompts)
    spoilt.tokens[data.split[data.prompt] != "train"] *= 100.0
    vectors = np.random.default_rng(0).normal(size=(240, 8)).astype(np.float32)
    first, second = (Downstream(each).linear(vectors)[0] for each in (data, spoilt))
    assert np.array_equal(first, second)


def test_vectors_that_tell_the_word_explain_the_lengths_and_noise_does_not(down: Downstream) -> None:
    truth = np.eye(4, dtype=np.float32)[[WORDS.index(p.text.split()[0].decode()) for p in down.data.prompts]]
    noise = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32)
    known, unknown = (down.explained(down.linear(vectors)[0]) for vectors in (truth, noise))
    assert min(known) > 0.8
    assert max(unknown) < min(known) - 0.2


def test_every_answer_of_a_prompt_is_in_its_lesson(down: Downstream) -> None:
    lessons, data = lessons_of(down), down.data
    assert sum(len(residuals) for residuals in lessons.residuals) == len(data.tokens)
    expected = down.log - down.expected
    assert np.allclose(np.sort(lessons.residuals[7]), np.sort(expected[data.prompt == 7]))


def test_the_hashed_encoder_beats_the_means(down: Downstream, tmp_path: Path) -> None:
    several = entries(down, target=None, work=tmp_path, quick=True, log=lambda message: None)
    rows = [measure(down, make(), [0], epochs=6) for _, make in itertools.islice(several, 3)]
    assert [row["encoder"] for row in rows[:2]] == ["none", "counts"]
    none, _, hashed = (float(row["pinball_test"] or np.nan) for row in rows)
    assert hashed < 0.8 * none
    plot(rows, tmp_path / "encoders.png")
    assert (tmp_path / "encoders.png").stat().st_size > 1000


def test_the_knee_is_the_cheapest_within_three_percent_of_the_best() -> None:
    rows = [
        {"encoder": "a", "pinball_validation": 12.0, "cpu_ms_2kb": 0.01},
        {"encoder": "b", "pinball_validation": 10.2, "cpu_ms_2kb": 0.1},
        {"encoder": "c", "pinball_validation": 10.1, "cpu_ms_2kb": 5.0},
        {"encoder": "d", "pinball_validation": 10.0, "cpu_ms_2kb": 90.0},
    ]
    assert knee(list(rows)) == "b"


def test_cpu_time_is_that_of_the_prompt_as_it_is_cut() -> None:
    seen: list[int] = []
    assert cpu_ms(lambda prompt: seen.append(len(prompt.text)), b"x" * 50_000, least_s=0.0) >= 0.0
    assert set(seen) == {8192}

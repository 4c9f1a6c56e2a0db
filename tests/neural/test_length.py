"""The length head: what its memory knows, and what training makes of prompts and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import PredictorError
from swarmx.core.prompts import Encoding, PromptText, cut
from swarmx.neural.checkpoint import load_arrays, load_head
from swarmx.neural.encoders.hashed import load_hashed
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.heads.length import MEMORY, LengthMemory, length_spec, load_memory, log_params
from swarmx.neural.losses import coverage, pinball
from swarmx.neural.training.hashed import HashedSettings
from swarmx.neural.training.lengths import ask, read_lengths
from swarmx.neural.training.run import LENGTH_SETTINGS, train, train_adapted, train_length
from tests.agents.worlds import a_call
from tests.neural.length_weights import BITS, EXPERTS, THEMES, write_weights
from tests.neural.prompts import MODELS, write_lengths

SMALL = HashedSettings(bits=10, themes=2, experts=2)
QUICK = replace(LENGTH_SETTINGS, epochs=4, hidden=16)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


def memory() -> LengthMemory:
    return LengthMemory(
        kind_means=np.full(EXPERTS, 5.0, dtype=np.float32), kind_spreads=np.full(EXPERTS, 0.6, dtype=np.float32)
    )


def feature(row: np.ndarray, name: str) -> float:
    return float(row[length_spec(THEMES, EXPERTS).features.index(name)])


def test_a_model_never_seen_costs_nothing_and_one_answer_of_it_already_counts(weights: Path) -> None:
    encoder, known = load_hashed(weights), memory()
    vector = encoder.encode_one(cut(b"how long?"))
    _, before = known.features(encoder, vector, "m", "k/r")
    known.learn(encoder, vector, "m", "k/r", 5000.0)
    row, after = known.features(encoder, vector, "m", "k/r")
    assert after > before + 0.3
    assert known.seen("m", "k/r") == (1, 1)
    assert feature(row, "log_model_seen") == pytest.approx(math.log(2.0))


def test_the_anchor_comes_near_to_what_a_model_always_does(weights: Path) -> None:
    encoder, known = load_hashed(weights), memory()
    vector = encoder.encode_one(cut(b"how long?"))
    for _ in range(200):
        known.learn(encoder, vector, "m", "k/r", 700.0)
    _, anchor = known.features(encoder, vector, "m", "k/r")
    assert anchor == pytest.approx(math.log(701.0), abs=0.15)


def test_a_role_is_known_to_a_model_that_is_not(weights: Path) -> None:
    encoder, known = load_hashed(weights), memory()
    vector = encoder.encode_one(cut(b"plan this"))
    _, before = known.features(encoder, vector, "new", "k/planner")
    for model in ("a", "b", "c"):
        for _ in range(30):
            known.learn(encoder, vector, model, "k/planner", 20.0)
    _, after = known.features(encoder, vector, "new", "k/planner")
    assert after < before - 0.5


def test_old_answers_fade(weights: Path) -> None:
    encoder, known = load_hashed(weights), memory()
    vector = encoder.encode_one(cut(b"x"))
    for tokens in [100.0] * 2000 + [1000.0] * 2000:
        known.learn(encoder, vector, "m", "r", tokens)
    _, anchor = known.features(encoder, vector, "m", "r")
    assert anchor == pytest.approx(math.log(1001.0), abs=0.1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.floats(0.0, 1e7)), max_size=30))
def test_features_are_finite_whatever_was_seen(weights: Path, seen: list[tuple[str, str, float]]) -> None:
    encoder, known = load_hashed(weights), memory()
    vector = encoder.encode_one(cut(b"any"))
    for model, role, tokens in seen:
        known.learn(encoder, vector, model, role, tokens)
    row, anchor = known.features(encoder, vector, "a", "x")
    others = np.delete(row, length_spec(THEMES, EXPERTS).features.index("log_params"))
    assert np.isfinite(others).all()
    assert math.isfinite(anchor)


def test_the_memory_is_bounded(weights: Path) -> None:
    encoder, known = load_hashed(weights), memory()
    known.limit = 50
    vector = encoder.encode_one(cut(b"any"))
    for i in range(100):
        known.learn(encoder, vector, f"m{i}", f"r{i}", 10.0)
    assert known.seen("m99", "r99") == (1, 1)
    assert known.seen("m0", "r0") == (0, 0)


def test_what_ships_knows_models_and_no_roles(weights: Path, tmp_path: Path) -> None:
    encoder, known = load_hashed(weights), memory()
    vector = encoder.encode_one(cut(b"any"))
    for _ in range(100):
        known.learn(encoder, vector, "m", "secret-project/planner", 50.0)
    known.save(tmp_path, {"licence": "CC0-1.0"})
    assert "secret" not in (tmp_path / f"{MEMORY}.json").read_text()
    loaded, _ = load_memory(tmp_path, EXPERTS)
    assert loaded.seen("m", "secret-project/planner") == (30, 0)


def test_a_memory_for_another_encoder_is_refused(weights: Path) -> None:
    with pytest.raises(PredictorError, match="expected 7"):
        load_memory(weights, 7)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-7B-Instruct", 7.0),
        ("llama-3.1-405b", 405.0),
        ("mixtral-8x7b", None),
        ("gpt-4o", None),
        ("a-0.5b", 0.5),
    ],
)
def test_a_name_may_tell_the_size_of_a_model(name: str, billions: float | None) -> None:
    found = log_params(name)
    assert math.isnan(found) if billions is None else found == pytest.approx(math.log(billions))


def test_training_learns_the_law_of_the_data_and_calibrates(tmp_path: Path) -> None:
    write_lengths(tmp_path)
    lengths = read_lengths(tmp_path, SMALL.bits)
    data, head = train_length(lengths, encoder=SMALL, settings=QUICK)
    rows = lengths.rows("test", "train").nonzero()[0]
    features, anchor = ask(data.memory, data.encoder, data.vectors, lengths, rows)
    q = head.quantiles(features, anchor)
    truth, levels = lengths.tokens[rows], head.spec.levels
    empirical = np.tile(np.quantile(lengths.tokens[lengths.rows("train", "train")], levels), (len(rows), 1))
    assert pinball(truth, q, levels).mean() < 0.5 * pinball(truth, empirical, levels).mean()
    assert coverage(truth, q, levels, 0.9) == pytest.approx(0.9, abs=0.08)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    write_lengths(tmp_path / "prompts", prompts=120)
    for out in ("one", "two"):
        train(["length"], tmp_path, tmp_path / out, seed=3)
    for name in ("encoder_hashed", "length_memory", "length"):
        assert (tmp_path / "one" / f"{name}.safetensors").read_bytes() == (
            tmp_path / "two" / f"{name}.safetensors"
        ).read_bytes()
    _, card = load_arrays(tmp_path / "one", "length")
    assert set(card.metrics) == {"pinball", "pinball_log", "crps", "kendall_tau"}
    assert set(card.data) == {"prompts.parquet", "lengths.parquet"}
    encoder = load_hashed(tmp_path / "one")
    head, _ = load_head(tmp_path / "one", length_spec(encoder.themes, encoder.experts))
    assert head.version == card.version


def test_no_test_prompt_or_test_model_is_learnt_from(tmp_path: Path) -> None:
    write_lengths(tmp_path)
    lengths = read_lengths(tmp_path, SMALL.bits)
    spoilt = replace(
        lengths,
        tokens=np.where(
            (lengths.prompt_split[lengths.prompt] == "test") | (lengths.model_split == "test"), 9e6, lengths.tokens
        ),
    )
    data, head = train_length(lengths, encoder=SMALL, settings=QUICK)
    other, head_too = train_length(spoilt, encoder=SMALL, settings=QUICK)
    assert np.array_equal(data.encoder.table, other.encoder.table)
    assert np.array_equal(head.nets[0].out, head_too.nets[0].out)


class Verbs:
    """A slow encoder that knows one thing: whether the prompt asks for an explanation."""

    name, slow, dimension = "verbs", True, 2

    def __init__(self, version: str = "verbs-1") -> None:
        self.version = version

    def encode(self, prompts: Sequence[PromptText]) -> np.ndarray:
        explains = [b"Explain" in prompt.text for prompt in prompts]
        return np.array([[1.0, 0.0] if explain else [0.0, 1.0] for explain in explains], dtype=np.float32)


def test_a_slower_encoder_is_brought_into_the_same_layout_and_forecasts_in_the_second_place(tmp_path: Path) -> None:
    write_lengths(tmp_path / "prompts")
    cards = train_adapted(Verbs(), tmp_path, tmp_path / "out")
    assert [card.name for card in cards] == ["encoder_adapted", "length_memory", "length"]
    encoder, forecaster = NeuralForecaster.load_second(tmp_path / "out", Verbs())
    call = a_call("c", model="house-7b", work_limit=1e5)
    short, long = (
        forecaster.forecast(call, Encoding(encoder=encoder.version, vector=encoder.encode([cut(text)])[0]))
        for text in (
            b"Name in one word what rivers do, case 3.",
            b"Explain in detail, with examples, how rivers do, case 3.",
        )
    )
    assert long.quantile(0.5) > 1.8 * short.quantile(0.5)
    with pytest.raises(PredictorError, match="reads the vectors of verbs-1, not of verbs-2"):
        NeuralForecaster.load_second(tmp_path / "out", Verbs("verbs-2"))


def test_a_new_installation_is_forecast_well_before_it_knows_any_role(tmp_path: Path) -> None:
    write_lengths(tmp_path, prompts=600)
    lengths = read_lengths(tmp_path, SMALL.bits)
    data, head = train_length(lengths, encoder=SMALL, settings=replace(QUICK, epochs=8))
    rows = lengths.rows("test", "train").nonzero()[0]
    truth, levels = lengths.tokens[rows], head.spec.levels
    features, anchor = ask(data.shipped.as_shipped(), data.encoder, data.vectors, lengths, rows, roles=False)
    q = head.quantiles(features, anchor)
    assert coverage(truth, q, levels, 0.5) == pytest.approx(0.5, abs=0.15)
    assert coverage(truth, q, levels, 0.9) == pytest.approx(0.9, abs=0.1)


def test_files_that_are_not_of_the_schema_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match=r"lengths\.parquet"):
        read_lengths(tmp_path, BITS)
    write_lengths(tmp_path, prompts=2)
    pl.read_parquet(tmp_path / "lengths.parquet").drop("out_tokens").write_parquet(tmp_path / "lengths.parquet")
    with pytest.raises(PredictorError, match="lacks the columns out_tokens"):
        read_lengths(tmp_path, BITS)
    assert len(MODELS) == 6

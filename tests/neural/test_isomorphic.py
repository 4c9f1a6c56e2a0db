"""The isomorphic encoder: what is kept of the target's own weights, what is refused, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from swarmx.core.errors import PredictorError  # noqa: E402
from swarmx.core.prompts import cut  # noqa: E402
from swarmx.neural.encoders.isomorphic import MOST_TOKENS, IsomorphicEncoder, Reduction, reduced_config  # noqa: E402
from swarmx.neural.training.encoder import EncoderSettings, Lessons, fit_encoder  # noqa: E402
from swarmx.neural.training.reduce import reduced  # noqa: E402
from tests.neural.tiny import SENTENCES, a_target  # noqa: E402

TEXTS = [cut(sentence.encode()) for sentence in SENTENCES]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_target(tmp_path_factory.mktemp("target"))


def of_target(target: Path, layers: int, encoder: IsomorphicEncoder) -> Any:
    """Mean and last hidden state of the target's own first layers, by transformers alone."""
    from transformers import AutoModel, Qwen2Config

    config = {k: v for k, v in json.loads((target / "config.json").read_text()).items() if k != "model_type"}
    model = AutoModel.from_config(Qwen2Config(**config)).float().eval()
    weights = load_file(target / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    model.layers = model.layers[:layers]
    model.config.num_hidden_layers = layers
    out = []
    with torch.no_grad():
        for text in TEXTS:
            hidden = model(input_ids=torch.tensor([encoder.tokens(text)])).last_hidden_state[0]
            out.append(torch.cat([hidden.mean(0), hidden[-1]]).numpy())
    return np.stack(out)


@pytest.mark.parametrize("layers", [1, 2])
def test_at_full_width_it_is_the_first_layers_of_the_target(target: Path, layers: int) -> None:
    encoder = reduced(target, Reduction(layers=layers, width=None))
    # The token table is kept in half precision.
    assert np.allclose(encoder.encode(TEXTS), of_target(target, layers, encoder), atol=5e-3)


@pytest.mark.parametrize("texts", [(), TEXTS], ids=["by weights", "by texts"])
def test_a_narrower_one_tells_prompts_apart_as_the_target_does(target: Path, texts: Any) -> None:
    full = reduced(target, Reduction(layers=2, width=None)).encode(TEXTS)
    narrow = reduced(target, Reduction(layers=2, width=15), texts).encode(TEXTS)
    random = reduced(target, Reduction(layers=2, width=15), initialise=False, seed=5).encode(TEXTS)
    assert apart(narrow, full) > 0.9
    assert apart(narrow, full) > apart(random, full)


def apart(a: Any, b: Any) -> float:
    """Correlation of the distances between prompts."""
    pairs = np.triu_indices(len(a), 1)
    return float(np.corrcoef(*(np.linalg.norm(x[:, None] - x[None], axis=2)[pairs] for x in (a, b)))[0, 1])


def test_random_weights_are_those_of_the_seed(target: Path) -> None:
    first, again, other = (
        reduced(target, Reduction(layers=1, width=8), initialise=False, seed=seed) for seed in (1, 1, 2)
    )
    assert first.version == again.version != other.version
    assert first.dimension == 16
    assert first.parameters < reduced(target, Reduction(layers=2, width=8), initialise=False).parameters


def test_of_a_long_prompt_both_ends_are_read(target: Path) -> None:
    encoder = reduced(target, Reduction(layers=1, width=8), initialise=False)
    tokens = encoder.tokens(cut(b"Once upon a time " + b"0123456789" * 600 + b" and so it ended."))
    assert len(tokens) == MOST_TOKENS
    assert tokens[:5] == encoder.tokens(cut(b"Once upon a time "))[:5]
    assert tokens[-5:] == encoder.tokens(cut(b" and so it ended."))[-5:]
    assert len(encoder.tokens(cut(b""))) == 1


@pytest.mark.parametrize(
    ("reduction", "match"),
    [(Reduction(layers=3, width=8), "cannot be had"), (Reduction(layers=1, width=17), "cannot be had"),
     (Reduction(layers=0, width=8), "cannot be had")],
)  # fmt: skip
def test_more_than_the_target_has_is_refused(target: Path, reduction: Reduction, match: str) -> None:
    with pytest.raises(PredictorError, match=match):
        reduced_config(target, reduction)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="cannot be read"):
        reduced(tmp_path, Reduction())


@pytest.mark.parametrize(
    "damage", ["no tokenizer", "no weights", "cut short", "no table", "a layer less", "no JSON", "no decoder", "other"]
)
def test_a_damaged_or_foreign_target_is_refused(tmp_path: Path, damage: str) -> None:
    folder = a_target(tmp_path)
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    match damage:
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no weights":
            weights.unlink()
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "no table":
            save_file({name: value for name, value in tensors.items() if "embed" not in name}, weights)
        case "a layer less":
            save_file({name: value for name, value in tensors.items() if ".1." not in name}, weights)
        case "no JSON":
            config.write_text("{")
        case "no decoder":
            config.write_text('{"model_type": "qwen2"}')
        case _:
            config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "no_such_model"}))
    with pytest.raises(PredictorError):
        reduced(folder, Reduction(layers=2, width=8))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = a_target(tmp_path, vocab_size=20)
    with pytest.raises(PredictorError, match="take both files from the same model"):
        reduced(folder, Reduction(layers=1, width=8), initialise=False)


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    folder = a_target(tmp_path)
    whole = reduced(folder, Reduction(layers=2, width=None)).version
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name].clone() for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reduced(folder, Reduction(layers=2, width=None)).version == whole


def lessons(count: int = 96) -> Lessons:
    """Essays are long, names are short: the word decides."""
    rng = np.random.default_rng(0)
    words = ("Name the capital", "Write an essay")
    kinds = rng.integers(0, 2, size=count)
    prompts = [cut(f"{words[kind]} of Peru {'x' * int(rng.integers(1, 9))}".encode()) for kind in kinds]
    residuals = [rng.normal(2.0 * kind - 1.0, 0.2, size=4) for kind in kinds]
    split = np.array(["train", "train", "train", "validation"] * (count // 4))
    return Lessons(prompts=prompts, residuals=residuals, classes=["chat"] * count, split=split)


SETTINGS = EncoderSettings(epochs=3, probe_epochs=3, batch=8, learning_rate=3e-3, train_table=True)


def test_training_lowers_the_loss_on_prompts_that_were_held_back(target: Path) -> None:
    losses: list[float] = []
    start = reduced(target, Reduction(layers=1, width=8), initialise=False)
    trained = fit_encoder(start, lessons(), SETTINGS, progress=lambda epoch, loss: losses.append(loss))
    assert min(losses[1:]) < losses[0]
    assert trained.version != start.version
    assert trained.config == start.config


def test_the_same_seed_trains_the_same_encoder(target: Path) -> None:
    start = reduced(target, Reduction(layers=1, width=8), initialise=False)
    versions = {fit_encoder(start, lessons(), SETTINGS).version for _ in range(2)}
    assert len(versions) == 1


def test_training_does_not_change_the_encoder_that_it_was_given(target: Path) -> None:
    start = reduced(target, Reduction(layers=1, width=8), initialise=False)
    before = start.encode(TEXTS)
    fit_encoder(start, lessons(), SETTINGS)
    assert np.array_equal(start.encode(TEXTS), before)


def test_too_few_prompts_are_refused(target: Path) -> None:
    start = reduced(target, Reduction(layers=1, width=8), initialise=False)
    with pytest.raises(PredictorError, match="give it more data"):
        fit_encoder(start, lessons(16), SETTINGS)


def test_with_next_to_no_steps_the_loss_stays_where_it_was(target: Path) -> None:
    losses: list[float] = []
    start = reduced(target, Reduction(layers=2, width=8), initialise=False)
    settings = EncoderSettings(epochs=1, probe_epochs=40, learning_rate=1e-9, probe_learning_rate=1e-2)
    fit_encoder(start, lessons(), settings, progress=lambda epoch, loss: losses.append(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)

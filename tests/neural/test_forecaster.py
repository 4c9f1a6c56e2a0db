"""The house forecaster with the weights that ship."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS
from swarmx.core.prompts import Encoding, cut
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.head import Head
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.net import QuantileNet
from swarmx.neural.tracking import QuantileTracker
from tests.agents.worlds import a_call
from tests.neural.length_weights import write_weights

TEXT = cut(b"Please sum up the three papers below in one paragraph each.")


@pytest.fixture
def forecaster() -> NeuralForecaster:
    return NeuralForecaster.load(None, QuantileTracker(LEVELS), FollowTheLeader(LEVELS))


SHIPPED = NeuralForecaster.load()


def another_like(head: Head) -> Head:
    """The head that thinks everything is twice as long."""
    net = head.nets[0]
    bias = net.out_bias.copy()
    bias[net.middle] += np.float32(math.log(2.0))
    return replace(head, nets=(replace_bias(net, bias),), version="another")


def replace_bias(net: QuantileNet, bias: np.ndarray) -> QuantileNet:
    return QuantileNet(
        hidden=net.hidden, hidden_bias=net.hidden_bias, out=net.out, skip=net.skip, out_bias=bias, middle=net.middle
    )


@given(st.text(max_size=400), st.text(max_size=20), st.floats(1.0, 1e7))
def test_any_prompt_in_any_language_has_a_forecast(text: str, model: str, limit: float) -> None:
    call = a_call("c", model=model, work_limit=limit)
    forecast = SHIPPED.forecast(call, SHIPPED.encode(call, cut(text.encode("utf-8", "surrogatepass"))))
    assert all(0.0 <= q <= limit for q in forecast.quantiles)


@pytest.mark.parametrize("text", [b"", b"\x00\x1b[31m\xff\xfe", b"word " * 210_000, "日本語".encode() * 5000])
def test_an_empty_a_broken_and_a_huge_prompt_are_ordinary(forecaster: NeuralForecaster, text: bytes) -> None:
    call = a_call("c")
    assert forecaster.forecast(call, forecaster.encode(call, cut(text))).unit == "tokens"


def test_a_model_and_role_never_seen_get_a_wide_forecast_that_says_so(forecaster: NeuralForecaster) -> None:
    call = a_call("c", model="nobody-knows-it", work_limit=100_000.0)
    first = forecaster.forecast(call, forecaster.encode(call, TEXT))
    assert first.source == "prior"
    for _ in range(40):
        forecaster.observe(call, forecaster.encode(call, TEXT), 120.0)
    known = forecaster.forecast(call, forecaster.encode(call, TEXT))
    assert known.source == "neural"
    width = [math.log(f.quantile(0.9) / f.quantile(0.1)) for f in (first, known)]
    assert width[1] < 0.6 * width[0]


def test_an_answer_that_was_cut_off_does_not_make_forecasts_shorter(forecaster: NeuralForecaster) -> None:
    call, short = a_call("c", work_limit=1e6), a_call("c", work_limit=8.0)
    for _ in range(60):
        forecaster.observe(call, forecaster.encode(call, TEXT), 400.0)
    before = forecaster.forecast(call, forecaster.encode(call, TEXT)).quantile(0.5)
    for _ in range(30):
        forecaster.observe(short, forecaster.encode(short, TEXT), 8.0)
    after = forecaster.forecast(call, forecaster.encode(call, TEXT)).quantile(0.5)
    assert after == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("limit", [16.0, 256.0])
def test_a_class_that_mostly_reaches_its_limit_is_forecast_to_do_so(forecaster: NeuralForecaster, limit: float) -> None:
    call, rng = a_call("c", work_limit=limit), np.random.default_rng(0)
    within = 0
    for i in range(400):
        encoding = forecaster.encode(call, TEXT)
        came_to = limit if rng.random() < 0.8 else limit / 2.0
        within += i >= 200 and came_to <= forecaster.forecast(call, encoding).quantile(0.9)
        forecaster.observe(call, encoding, came_to)
    assert within >= 180


def test_weights_of_two_trainings_are_not_mixed(tmp_path: Path) -> None:
    write_weights(tmp_path / "one")
    write_weights(tmp_path / "two", seed=1)
    for name in ("length.json", "length.safetensors"):
        (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(PredictorError, match="take all files of one training"):
        NeuralForecaster.load(tmp_path / "one")


def test_what_another_encoder_read_teaches_nothing(forecaster: NeuralForecaster) -> None:
    call = a_call("c", model="m-new")
    vector = forecaster.encode(call, TEXT).vector
    forecaster.observe(call, Encoding(encoder="another", vector=vector), 10.0)
    assert forecaster.memory.seen("m-new", "any") == (0, 0)


def test_work_of_images_is_known_from_the_request(forecaster: NeuralForecaster) -> None:
    call = a_call("c", kind="image", work_limit=30.0)
    forecast = forecaster.forecast(call, forecaster.encode(call, TEXT))
    assert (forecast.unit, forecast.quantile(0.5)) == ("work", 30.0)


def test_after_a_swap_the_correction_is_that_of_the_new_head(forecaster: NeuralForecaster) -> None:
    call = a_call("c", work_limit=1e6)
    for _ in range(100):
        forecaster.observe(call, forecaster.encode(call, TEXT), 300.0)
    before = forecaster.forecast(call, forecaster.encode(call, TEXT))
    previous = forecaster.swap(another_like(forecaster.head))
    swapped = forecaster.forecast(call, forecaster.encode(call, TEXT))
    assert swapped.version != before.version
    assert swapped.quantile(0.5) == pytest.approx(300.0, rel=0.3)
    forecaster.swap(previous)
    back = forecaster.forecast(call, forecaster.encode(call, TEXT))
    assert back.version == before.version
    assert back.quantile(0.5) == pytest.approx(before.quantile(0.5), rel=0.1)


def test_equal_histories_give_equal_forecasts() -> None:
    def told() -> tuple[float, ...]:
        made = NeuralForecaster.load(None, QuantileTracker(LEVELS), FollowTheLeader(LEVELS))
        rng, call = np.random.default_rng(1), a_call("c")
        for _ in range(50):
            made.observe(call, made.encode(call, TEXT), float(rng.integers(1, 900)))
        return made.forecast(call, made.encode(call, TEXT)).quantiles

    assert told() == told()


def test_missing_weights_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="swarmx train"):
        NeuralForecaster.load(tmp_path)

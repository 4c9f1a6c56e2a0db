from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.engine import profiles
from swarmx.core.messages import ServiceCurvePublished
from swarmx.neural.checkpoint import middle_of
from swarmx.neural.curves import UNCACHED, WORK, read_curve, read_ttft, service_curve
from swarmx.neural.facts import device_facts, model_facts
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.heads.latency import COMPLETION, GROUP, TTFT, Candidate, Candidates, RuntimeState, inputs
from swarmx.neural.net import QuantileNet

KEY = ("llama-3.1-8b", "h100")
REPLICA = Candidate(profile=profiles()[KEY], device=device_facts(KEY[1]), model=model_facts(KEY[0]))


def head(spec: HeadSpec, seed: int, size: float) -> Head:
    """A head whose network says `size` times something random about the engine's estimate."""
    rng = np.random.default_rng(seed)
    features, k = len(spec.features), len(spec.levels)

    def array(*shape: int) -> np.ndarray:
        return (size * rng.normal(size=shape)).astype(np.float32)

    bias = np.full(k, -4.0, dtype=np.float32)
    bias[middle_of(spec.levels)] = 0.0
    net = QuantileNet(
        hidden=array(features, 8), hidden_bias=array(8), out=array(8, k), skip=array(features, k),
        out_bias=bias, middle=middle_of(spec.levels),
    )  # fmt: skip
    return Head(
        spec=spec,
        mean=np.full(features, 2.0, dtype=np.float32),
        scale=np.full(features, 3.0, dtype=np.float32),
        nets=(net,),
        version=f"{spec.name}-{seed}",
    )


def busy(ahead: float = 5.0) -> RuntimeState:
    return RuntimeState(
        in_flight=[ahead], remaining_work=[ahead * 200.0], context_tokens=[ahead * 900.0], prefill_tokens=[0.0],
        running=[ahead], waiting=[0.0], kv_usage=[0.1], signal_age_s=[0.5],
    )  # fmt: skip


def curve(*, seed: int = 0, size: float = 0.01, ahead: float = 5.0) -> ServiceCurvePublished:
    return service_curve(
        head(TTFT, seed, size), head(COMPLETION, seed, size), REPLICA, busy(ahead), replica_id="r", measured_at_s=3.0
    )


def test_a_curve_names_its_replica_its_grid_and_its_weights() -> None:
    published = curve(seed=4)
    assert (published.replica_id, published.measured_at_s) == ("r", 3.0)
    assert (published.work, published.uncached, published.levels) == (WORK, UNCACHED, COMPLETION.levels)
    assert len(published.completion_s) == len(WORK) * len(UNCACHED) * len(COMPLETION.levels)
    assert len(published.ttft_s) == len(UNCACHED) * len(TTFT.levels)
    assert published.version == "ttft-4 completion-4"


def test_at_the_points_of_the_grid_the_curve_is_the_head() -> None:
    """With a network so small that its word never falls in work or tokens; then nothing has to be straightened."""
    published = curve(size=0.001)
    for work in WORK:
        for tokens in UNCACHED:
            made = inputs(
                Candidates.of([REPLICA]), busy(), prompt_tokens=tokens, uncached_tokens=tokens, output_tokens=work
            )
            expected = head(COMPLETION, 0, 0.001).quantiles(
                made.features(COMPLETION), made.completion_anchor(work), GROUP
            )
            assert read_curve(published, work, tokens) == pytest.approx(expected, rel=2e-3, abs=1e-4)
            first = head(TTFT, 0, 0.001).quantiles(made.features(TTFT), made.ttft_anchor, GROUP)
            assert read_ttft(published, tokens) == pytest.approx(first, rel=2e-2, abs=1e-4)


def test_between_the_points_the_curve_is_within_a_sixth_of_the_head() -> None:
    published = curve(size=0.001)
    for work, tokens in ((7.0, 3000.0), (100.0, 600.0), (500.0, 100.0), (2500.0, 9000.0)):
        made = inputs(
            Candidates.of([REPLICA]), busy(), prompt_tokens=tokens, uncached_tokens=tokens, output_tokens=work
        )
        expected = head(COMPLETION, 0, 0.001).quantiles(made.features(COMPLETION), made.completion_anchor(work), GROUP)
        upper = slice(3, None)  # below, what is left after `softening` is near zero, where no factor means anything
        assert read_curve(published, work, tokens)[:, upper] == pytest.approx(expected[:, upper], rel=1 / 6)


amounts = st.floats(0.0, 1e7)


@settings(max_examples=60)
@given(seed=st.integers(0, 50), size=st.sampled_from([0.01, 0.3]), a=amounts, b=amounts, tokens=amounts)
def test_a_curve_never_falls_in_level_or_work(seed: int, size: float, a: float, b: float, tokens: float) -> None:
    q = read_curve(curve(seed=seed, size=size), np.array([min(a, b), max(a, b)]), tokens)
    assert q.shape == (2, len(COMPLETION.levels))
    assert np.isfinite(q).all()
    assert (np.diff(q, axis=1) >= 0.0).all()
    assert (q[1] >= q[0] * (1.0 - 1e-9)).all()


@settings(max_examples=60)
@given(seed=st.integers(0, 50), a=amounts, b=amounts)
def test_more_uncached_tokens_never_make_the_first_token_sooner(seed: int, a: float, b: float) -> None:
    q = read_ttft(curve(seed=seed, size=0.3), np.array([min(a, b), max(a, b)]))
    assert (q[1] >= q[0] * (1.0 - 1e-9)).all()
    assert (np.diff(q, axis=1) >= 0.0).all()


def test_outside_the_grid_its_edge_holds() -> None:
    published = curve()
    assert read_curve(published, 9e9, 9e9) == pytest.approx(read_curve(published, WORK[-1], UNCACHED[-1]))
    assert read_curve(published, 0.0, 0.0) == pytest.approx(read_curve(published, WORK[0], 0.0))


def test_work_that_is_no_number_is_read_as_none() -> None:
    assert read_curve(curve(), math.nan, math.nan) == pytest.approx(read_curve(curve(), 0.0, 0.0))


def test_a_grid_that_does_not_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="work must be at least two numbers that rise"):
        service_curve(
            head(TTFT, 0, 0.01), head(COMPLETION, 0, 0.01), REPLICA, busy(), replica_id="r", measured_at_s=0.0,
            work=(10.0, 5.0),
        )  # fmt: skip

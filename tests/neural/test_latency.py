from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.forecast import LEVELS
from swarmx.neural.checkpoint import middle_of
from swarmx.neural.facts import DEVICES, MODELS, UNKNOWN_DEVICE, UNKNOWN_MODEL, device_facts, model_facts, plain_name
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.heads.latency import (
    COMPLETION,
    TTFT,
    Candidate,
    Candidates,
    FleetHead,
    Inputs,
    RuntimeState,
    completion_quantiles,
    inputs,
    ttft_quantiles,
)
from swarmx.neural.net import QuantileNet
from swarmx.neural.roofline import idle_weights_s, roofline

PROFILE = EngineProfile(
    model="m", device="d", step_base_s=0.01, decode_seq_s=1e-4, decode_ctx_token_s=1e-7, prefill_token_s=1e-5,
    prefill_ctx_token_s=1e-9, call_base_s=0.02, max_batch=8, kv_capacity_tokens=1_000_000,
)  # fmt: skip
REPLICA = Candidate(
    profile=PROFILE, device=DEVICES["h100"], model=MODELS["llama-3.1-8b"], tensor_parallel=1.0, bytes_a_weight=2.0
)
SHIPPED = [
    Candidate(profile=p, device=device_facts(p.device), model=model_facts(p.model))
    for p in profiles().values()
    if p.max_batch > 1
]
LENGTHS = (10.0, 20.0, 60.0, 150.0, 300.0, 600.0, 900.0, 1500.0)


def state(count: int, *, ahead: float = 0.0, work: float = 0.0, **known: float) -> RuntimeState:
    values = {"in_flight": ahead, "remaining_work": work, "context_tokens": 0.0, "prefill_tokens": 0.0}
    values |= {"running": math.nan, "waiting": math.nan, "kv_usage": math.nan, "signal_age_s": math.nan} | known
    return RuntimeState(**{name: np.full(count, value) for name, value in values.items()})


def random_head(spec: HeadSpec, *, seed: int = 0, nets: int = 2, size: float = 0.1, spread: float = -1.5) -> Head:
    rng = np.random.default_rng(seed)
    features, k = len(spec.features), len(spec.levels)

    def array(*shape: int) -> np.ndarray:
        return (size * rng.normal(size=shape)).astype(np.float32)

    bias = np.full(k, spread, dtype=np.float32)
    middle = middle_of(spec.levels)
    bias[middle] = 0.0
    return Head(
        spec=spec,
        mean=array(features),
        scale=np.ones(features, dtype=np.float32),
        nets=tuple(
            QuantileNet(
                hidden=array(features, 16), hidden_bias=array(16), out=array(16, k), skip=array(features, k),
                out_bias=bias, middle=middle,
            )
            for _ in range(nets)
        ),
        shifts={"": array(k)},
    )  # fmt: skip


def made(candidates: Candidates, there: RuntimeState, *, prompt: float = 500.0, output: float = 100.0) -> Inputs:
    return inputs(candidates, there, prompt_tokens=prompt, uncached_tokens=prompt, output_tokens=output)


def test_an_idle_replica_takes_what_the_engine_model_says() -> None:
    alone = made(Candidates.of([REPLICA]), state(1))
    assert alone.ttft_s[0] == pytest.approx(0.02 + 500 * 1e-5 + 500**2 / 2 * 1e-9 + 0.01 + 1e-4 + 500 * 1e-7, rel=1e-4)
    assert alone.completion_s(100.0)[0] == pytest.approx(PROFILE.alone_s(500, 100), rel=0.02)


def test_full_replicas_make_a_call_wait_for_the_work_before_it() -> None:
    candidates = Candidates.of([REPLICA])
    room = made(candidates, state(1, ahead=7.0, work=700.0))
    full = made(candidates, state(1, ahead=8.0, work=800.0))
    assert full.ttft_s[0] - room.ttft_s[0] == pytest.approx((100 * room.step_s[0] + 0.02) / 8, rel=0.01)


def test_a_cache_that_is_full_is_a_batch_that_is_full() -> None:
    small = REPLICA._replace(profile=EngineProfile(**{**_fields(PROFILE), "kv_capacity_tokens": 2000}))
    there = state(2, ahead=3.0, work=300.0, context_tokens=3000.0)
    wide, tight = made(Candidates.of([REPLICA, small]), there).ttft_s
    assert tight > wide


def test_strangers_that_the_engine_reports_count_like_our_own_calls() -> None:
    ours = made(Candidates.of([REPLICA]), state(1, ahead=12.0))
    theirs = made(Candidates.of([REPLICA]), state(1, running=8.0, waiting=4.0))
    assert theirs.ttft_s[0] == pytest.approx(ours.ttft_s[0])


def test_a_cached_prefix_saves_its_prefill() -> None:
    candidates, there = Candidates.of([REPLICA]), state(1)
    cold = inputs(candidates, there, prompt_tokens=4000, uncached_tokens=4000, output_tokens=10)
    warm = inputs(candidates, there, prompt_tokens=4000, uncached_tokens=100, output_tokens=10)
    assert warm.ttft_s[0] < cold.ttft_s[0]


def test_features_have_the_order_and_number_of_their_specs() -> None:
    read = made(Candidates.of(SHIPPED), state(len(SHIPPED)))
    assert read.features(COMPLETION).shape == (len(SHIPPED), len(COMPLETION.features))
    assert read.features(TTFT).shape == (len(SHIPPED), len(TTFT.features))
    assert COMPLETION.features[: len(TTFT.features)] == TTFT.features
    at = TTFT.features.index
    assert read.features(TTFT)[0, at("log_prompt")] == pytest.approx(math.log(501))
    assert read.features(TTFT)[0, at("averaged")] == 0.0
    assert read.features(TTFT)[0, at("device_known")] == 1.0
    assert read.features(COMPLETION)[0, COMPLETION.features.index("log_output")] == pytest.approx(math.log(101))


numbers = st.one_of(st.just(math.nan), st.just(math.inf), st.floats(0, 1e9), st.floats(-10, 0))


@settings(max_examples=60)
@given(values=st.lists(numbers, min_size=8, max_size=8), prompt=numbers, output=st.floats(0, 1e6))
def test_whatever_is_unknown_the_forecast_is_finite_and_rises(
    values: list[float], prompt: float, output: float
) -> None:
    names = ("in_flight", "remaining_work", "context_tokens", "prefill_tokens", "running", "waiting", "kv_usage",
             "signal_age_s")  # fmt: skip
    there = RuntimeState(**{name: np.array([value]) for name, value in zip(names, values, strict=True)})
    candidates = Candidates.of([Candidate(profile=PROFILE)])
    with np.errstate(all="ignore"):
        read = inputs(candidates, there, prompt_tokens=prompt, uncached_tokens=prompt, output_tokens=output)
        for q in (
            ttft_quantiles(FleetHead.of(random_head(TTFT), candidates), read),
            completion_quantiles(FleetHead.of(random_head(COMPLETION), candidates), read, LENGTHS),
        ):
            assert np.isfinite(q).all()
            assert (q >= 0.0).all()
            assert (np.diff(q, axis=1) >= 0.0).all()


def test_unknown_facts_are_nan_and_say_so() -> None:
    read = made(Candidates.of([Candidate(profile=PROFILE)]), state(1)).features(TTFT)[0]
    value = dict(zip(TTFT.features, read.tolist(), strict=True))
    assert math.isnan(value["log_tflops"])
    assert math.isnan(value["log_params_b"])
    assert value["device_known"] == value["model_known"] == 0.0


@pytest.mark.parametrize("spec", [TTFT, COMPLETION], ids=lambda spec: spec.name)
def test_a_head_made_ready_for_a_fleet_says_what_the_head_says(spec: HeadSpec) -> None:
    candidates = Candidates.of([*SHIPPED, Candidate(profile=PROFILE)])
    head = random_head(spec)
    read = made(candidates, state(len(candidates), ahead=3.0, work=500.0))
    anchor = read.ttft_anchor if spec is TTFT else read.completion_anchor(100.0)
    expected = head.quantiles(read.features(spec), anchor, "request")
    assert FleetHead.of(head, candidates).quantiles(read, anchor) == pytest.approx(expected, rel=1e-3)


def test_a_head_of_something_else_is_refused() -> None:
    other = HeadSpec(name="length", version=1, features=TTFT.features, unit="tokens", softening=1.0)
    with pytest.raises(ValueError, match="expected a head for ttft or completion, got one for length"):
        FleetHead.of(random_head(other), Candidates.of([REPLICA]))


def test_a_length_that_is_certain_leaves_the_spread_of_the_head() -> None:
    candidates = Candidates.of(SHIPPED)
    head = FleetHead.of(random_head(COMPLETION), candidates)
    read = made(candidates, state(len(SHIPPED), ahead=3.0, work=500.0), output=100.0)
    certain = completion_quantiles(head, read, [100.0] * len(LEVELS))
    assert certain == pytest.approx(head.quantiles(read, read.completion_anchor(100.0)), rel=1e-3)


def test_an_uncertain_length_widens_completion() -> None:
    candidates = Candidates.of([REPLICA])
    head = FleetHead.of(random_head(COMPLETION, size=0.02), candidates)
    read = made(candidates, state(1), output=150.0)
    certain = completion_quantiles(head, read, [150.0] * len(LEVELS))[0]
    uncertain = completion_quantiles(head, read, LENGTHS)[0]
    assert uncertain[-1] > certain[-1]
    assert uncertain[0] < certain[0]


def test_completion_quantiles_are_close_to_those_of_the_sampled_mixture() -> None:
    candidates = Candidates.of([REPLICA])
    head = FleetHead.of(random_head(COMPLETION, size=0.02, spread=-2.5), candidates)
    read = made(candidates, state(1, ahead=2.0, work=300.0))
    rng = np.random.default_rng(1)
    levels, samples = np.array(LEVELS), []
    for length in np.interp(rng.random(2000), levels, LENGTHS):
        q = head.quantiles(read.at_length(length), read.completion_anchor(length))[0]
        samples.append(np.interp(rng.random(20), levels, q))
    mixture = np.quantile(np.concatenate(samples), levels[2:-1])
    assert completion_quantiles(head, read, LENGTHS)[0, 2:-1] == pytest.approx(mixture, rel=0.1)


def test_lengths_must_be_quantiles_at_the_levels_of_the_head() -> None:
    candidates = Candidates.of([REPLICA])
    head = FleetHead.of(random_head(COMPLETION), candidates)
    read = made(candidates, state(1))
    with pytest.raises(ValueError, match="lengths must be 8 finite quantiles"):
        completion_quantiles(head, read, [100.0])
    with pytest.raises(ValueError, match="lengths must be 8 finite quantiles"):
        completion_quantiles(head, read, [math.nan] * 8)


def test_names_of_models_lose_publisher_tuning_and_precision() -> None:
    assert plain_name("meta-llama/Llama-3.1-8B-Instruct") == "llama-3.1-8b"
    assert plain_name("nvidia/Llama-3.1-8B-Instruct-FP8") == "llama-3.1-8b"
    assert plain_name("meta-llama/Meta-Llama-3-70B") == "llama-3-70b"
    assert model_facts("nobody/knows-this") == UNKNOWN_MODEL or math.isnan(model_facts("nobody/knows-this").params_b)


@pytest.mark.parametrize("profile", [c.profile for c in SHIPPED], ids=lambda p: f"{p.model}-{p.device}")
def test_every_shipped_profile_is_of_a_known_device_and_model(profile: EngineProfile) -> None:
    assert math.isfinite(device_facts(profile.device).tflops)
    assert math.isfinite(model_facts(profile.model).params_b)


def test_the_roofline_is_within_a_factor_of_two_of_a_measured_dense_engine() -> None:
    measured = profiles()["llama-3.1-8b", "h100"]
    guess = roofline(MODELS["llama-3.1-8b"], DEVICES["h100"])
    assert 0.5 < guess.alone_s(1000, 200) / measured.alone_s(1000, 200) < 2.0


def test_faster_devices_and_more_of_them_have_lower_rooflines() -> None:
    model = MODELS["llama-3.1-70b"]
    times = [
        roofline(model, DEVICES["l40s"], tensor_parallel=4).alone_s(1000, 100),
        roofline(model, DEVICES["h100"], tensor_parallel=4).alone_s(1000, 100),
        roofline(model, DEVICES["h100"], tensor_parallel=8).alone_s(1000, 100),
    ]
    assert all(a > b for a, b in pairwise(times))


def test_the_roofline_of_nothing_known_is_that_of_a_typical_replica() -> None:
    assert 0.1 < roofline(UNKNOWN_MODEL, UNKNOWN_DEVICE).alone_s(1000, 100) < 10.0


def test_only_mixtures_of_experts_have_weights_that_idle() -> None:
    assert idle_weights_s(MODELS["llama-3.1-70b"], DEVICES["h100"]) == 0.0
    assert idle_weights_s(UNKNOWN_MODEL, DEVICES["h100"]) == 0.0
    assert idle_weights_s(MODELS["deepseek-v3"], DEVICES["h100"], tensor_parallel=8) > 0.01


def _fields(profile: EngineProfile) -> dict[str, object]:
    return {name: getattr(profile, name) for name in profile.__struct_fields__}

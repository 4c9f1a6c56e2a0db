"""What every routing policy has to keep to, and the sentence that is true of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from swarmx.agents.choice import is_sound
from swarmx.agents.policies import DEFAULT_POLICY, POLICIES, describe, make_policy, parameters_of
from swarmx.core.errors import ConfigError
from swarmx.core.fleet import COLUMNS, CallView, Choice, FleetView, WorkflowView
from swarmx.core.forecast import Forecast, point
from tests.agents.worlds import FORECAST, a_call

EVERY = pytest.mark.parametrize("name", POLICIES)
INTS = ("in_flight", "last_chosen", "max_batch")
SIGNALS = ("running", "waiting", "kv_usage", "signal_age_s")
WORKFLOW = WorkflowView(
    kind="report",
    age_s=1.0,
    target_s=60.0,
    remaining_s=20.0,
    attained_s=0.5,
    attained_work=10.0,
    calls=1,
    past_s=np.array([5.0, 30.0]),
)
FIELDS = COLUMNS


def a_fleet(replicas: int, **columns: Any) -> FleetView:
    """Idle batching engines, but for the columns given; a second of each call there is worth 1."""
    usual = {
        "max_batch": 256,
        "kv_capacity_tokens": 1e6,
        "max_step_tokens": 8192,
        "cost_weight": 1,
        "slowdown": 1,
        "step_base_s": 0.01,
        "decode_seq_s": 1e-4,
        "weight": columns.get("in_flight", 0),
    }
    filled = {name: np.nan if name in SIGNALS else 0 for name in FIELDS} | usual | columns
    return FleetView(
        **{
            name: np.array(np.broadcast_to(value, replicas), dtype=np.int64 if name in INTS else np.float64)
            for name, value in filled.items()
        }
    )


def a_call_view(forecast: Forecast = FORECAST, **about: Any) -> CallView:
    return CallView(call=a_call("c", **about), forecast=forecast, workflow=WORKFLOW)


@st.composite
def fleets(draw: st.DrawFn) -> FleetView:
    replicas = draw(st.integers(1, 200))
    numbers = st.floats(0.0, 1e9) | st.sampled_from([0.0, 1e12])
    columns: dict[str, Any] = {}
    for name in FIELDS:
        if name in INTS:
            least = 1 if name == "max_batch" else 0
            columns[name] = draw(arrays.arrays(np.int64, replicas, elements=st.integers(least, 10**9)))
        else:
            known = numbers | st.just(float("nan")) if name in SIGNALS else numbers
            columns[name] = draw(arrays.arrays(np.float64, replicas, elements=known, fill=st.just(0.0)))
    return a_fleet(replicas, **columns)


calls = st.builds(
    a_call_view,
    forecast=st.floats(0.0, 1e9).map(lambda work: point(work, unit="tokens")),
    prompt_tokens=st.integers(0, 10**7),
)


@EVERY
@settings(max_examples=60, deadline=None)
@given(fleet=fleets(), call=calls, seed=st.integers(0, 2**32))
def test_any_fleet_gets_the_same_sound_choice_from_the_same_seed(
    name: str, fleet: FleetView, call: CallView, seed: int
) -> None:
    before = {field: getattr(fleet, field).copy() for field in FIELDS}
    choice = make_policy(name).choose(call, fleet, np.random.default_rng(seed))
    again = make_policy(name).choose(call, fleet, np.random.default_rng(seed))
    assert is_sound(choice, len(fleet))
    assert type(choice.index) is int
    assert again.index == choice.index
    for column in [*choice.terms_s.values(), *([] if choice.cost_s is None else [choice.cost_s])]:
        assert column.shape == (len(fleet),)
        assert np.isfinite(column).all()
    for field, column in before.items():
        np.testing.assert_array_equal(getattr(fleet, field), column, err_msg=f"{name} wrote into {field}")


@EVERY
def test_read_only_arrays_are_enough(name: str) -> None:
    fleet = a_fleet(3)
    for field in FIELDS:
        getattr(fleet, field).flags.writeable = False
    make_policy(name).choose(a_call_view(), fleet, np.random.default_rng(0))


@EVERY
def test_parameters_are_the_fields_of_a_frozen_dataclass(name: str) -> None:
    policy = make_policy(name)
    assert dataclasses.is_dataclass(policy)
    assert policy.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert parameters_of(name) == {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    assert make_policy(name, parameters_of(name)) == policy


@EVERY
def test_a_policy_knows_its_name_and_says_in_a_line_what_it_does(name: str) -> None:
    assert make_policy(name).name == name
    assert describe(name).endswith(".")


@EVERY
def test_an_unknown_parameter_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"policy '{name}' has no parameter 'psychic'"):
        make_policy(name, {"psychic": 1.0})


def test_an_unknown_policy_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown policy 'least_wrok'.*Did you mean 'least_work'\?"):
        make_policy("least_wrok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """The first candidate, patiently."""

    name: ClassVar[str] = "patient"
    patience_s: float = 1.0

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return Choice(index=0)


def test_a_misspelt_parameter_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "patient", Patient)  # type: ignore[arg-type]
    assert make_policy("patient", {"patience_s": 2.0}) == Patient(patience_s=2.0)
    with pytest.raises(ConfigError, match=r"it has patience_s. Did you mean 'patience_s'\?"):
        make_policy("patient", {"patiense_s": 2.0})


def test_the_default_policy_exists() -> None:
    assert DEFAULT_POLICY in POLICIES


def choose(name: str, fleet: FleetView, *, seed: int = 0, call: CallView | None = None) -> int:
    return make_policy(name).choose(call or a_call_view(), fleet, np.random.default_rng(seed)).index


def test_random_chooses_every_candidate_about_equally_often() -> None:
    policy, rng = make_policy("random"), np.random.default_rng(0)
    counts = np.bincount([policy.choose(a_call_view(), a_fleet(4), rng).index for _ in range(4000)])
    assert counts.min() > 900


def test_round_robin_visits_every_candidate_equally() -> None:
    last_chosen = np.zeros(5, dtype=np.int64)
    visits = []
    for decision in range(1, 26):
        visits.append(choose("round_robin", a_fleet(5, last_chosen=last_chosen)))
        last_chosen[visits[-1]] = decision
    assert visits == [0, 1, 2, 3, 4] * 5


@given(in_flight=st.lists(st.integers(0, 100), min_size=2, max_size=2), seed=st.integers(0, 1000))
def test_power_of_two_never_takes_the_more_loaded_of_two(in_flight: list[int], seed: int) -> None:
    index = choose("power_of_two", a_fleet(2, in_flight=in_flight), seed=seed)
    assert in_flight[index] == min(in_flight)


@given(in_flight=st.lists(st.integers(0, 100), min_size=2, max_size=50, unique=True), seed=st.integers(0, 1000))
def test_power_of_two_never_takes_the_most_loaded_of_all(in_flight: list[int], seed: int) -> None:
    index = choose("power_of_two", a_fleet(len(in_flight), in_flight=in_flight), seed=seed)
    assert in_flight[index] < max(in_flight)


@given(in_flight=st.lists(st.integers(0, 9), min_size=1, max_size=50), seed=st.integers(0, 1000))
def test_least_outstanding_takes_one_of_the_least_loaded(in_flight: list[int], seed: int) -> None:
    index = choose("least_outstanding", a_fleet(len(in_flight), in_flight=in_flight), seed=seed)
    assert in_flight[index] == min(in_flight)


def test_least_outstanding_breaks_ties_at_random() -> None:
    assert {choose("least_outstanding", a_fleet(4), seed=seed) for seed in range(50)} == {0, 1, 2, 3}


def test_least_work_prefers_the_faster_of_two_idle_devices() -> None:
    assert choose("least_work", a_fleet(3, step_base_s=[0.03, 0.01, 0.02])) == 1


def test_least_work_prefers_the_device_that_reads_a_long_prompt_faster() -> None:
    fleet = a_fleet(2, step_base_s=[0.010, 0.011], prefill_token_s=[1e-3, 1e-4])
    assert choose("least_work", fleet, call=a_call_view(prompt_tokens=10)) == 0
    assert choose("least_work", fleet, call=a_call_view(prompt_tokens=10_000)) == 1


@pytest.mark.parametrize(("work_left", "chosen"), [(50.0, 0), (150.0, 1)])
def test_least_work_waits_for_a_fast_serial_server_only_while_that_pays(work_left: float, chosen: int) -> None:
    fleet = a_fleet(
        2, max_batch=1, decode_seq_s=0.0, step_base_s=[0.1, 0.2], in_flight=[1, 0], remaining_work=[work_left, 0.0]
    )
    call = a_call_view(point(100.0, unit="work"), kind="image", prompt_tokens=0)
    assert choose("least_work", fleet, call=call) == chosen


@given(
    replicas=st.lists(
        st.tuples(st.integers(0, 20), st.floats(0.1, 1000.0), st.floats(0.001, 10.0)), min_size=1, max_size=20
    ),
    own=st.floats(0.1, 1000.0),
)
def test_least_work_is_least_work_left_on_serial_servers(replicas: list[tuple[int, float, float]], own: float) -> None:
    ahead, work, step_s = (np.array(column, dtype=np.float64) for column in zip(*replicas, strict=True))
    left = np.where(ahead > 0, work, 0.0)
    fleet = a_fleet(
        len(replicas), max_batch=1, decode_seq_s=0.0, step_base_s=step_s, in_flight=ahead, remaining_work=left
    )
    call = a_call_view(point(own, unit="work"), kind="image", prompt_tokens=0)
    choice = make_policy("least_work").choose(call, fleet, np.random.default_rng(0))
    np.testing.assert_allclose(choice.cost_s, (left + own) * step_s, rtol=1e-9)
    assert choice.cost_s is not None
    assert choice.cost_s[choice.index] <= choice.cost_s.min() * (1.0 + 1e-8)


def test_the_cost_of_least_work_is_the_sum_of_its_terms() -> None:
    fleet = a_fleet(3, in_flight=[300, 3, 0], remaining_work=[9000.0, 300.0, 0.0], prefill_token_s=1e-4)
    choice = make_policy("least_work").choose(a_call_view(), fleet, np.random.default_rng(0))
    np.testing.assert_allclose(choice.cost_s, sum(choice.terms_s.values()))

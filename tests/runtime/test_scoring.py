"""Forecasts are scored by a relative loss, under labels that stay few."""

from __future__ import annotations

import math
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.forecast import Forecast
from swarmx.runtime.scoring import OTHER, PromptClasses, scored
from tests.agents.worlds import a_call

FORECAST = Forecast(levels=(0.5, 0.9), quantiles=(50.0, 99.0), unit="tokens", source="neural", version="v-1")


def loss(work_done: float) -> float:
    return scored(FORECAST, work_done, head="length", prompt_class="k/r").loss


def test_an_outcome_at_the_quantile_costs_nothing_and_is_covered() -> None:
    event = scored(FORECAST, 99.0, head="length", prompt_class="k/r")
    assert (event.loss, event.covered, event.version, event.device) == (0.0, True, "v-1", "")


def test_twice_as_much_costs_nine_times_what_half_as_much_does() -> None:
    assert loss(199.0) == pytest.approx(0.9 * math.log(2.0))
    assert loss(49.0) == pytest.approx(0.1 * math.log(2.0))
    assert not scored(FORECAST, 199.0, head="length", prompt_class="k/r").covered


@given(st.floats(0.0, 1e9))
def test_a_loss_is_finite_and_not_negative(work_done: float) -> None:
    assert 0.0 <= loss(work_done) < 1e3


def test_a_class_is_named_by_the_workflow_kind_and_the_role() -> None:
    assert PromptClasses().of(a_call("c", role="writer")) == "report/writer"


def test_after_the_limit_every_new_class_is_other_and_the_old_ones_keep_their_names() -> None:
    classes = PromptClasses(limit=2)
    names = [classes.of(a_call("c", role=role)) for role in ("a", "b", "c", "a", "d")]
    assert names == ["report/a", "report/b", OTHER, "report/a", OTHER]
    assert len(classes) == 2


@given(st.text(), st.text())
def test_a_class_has_few_plain_letters_whatever_the_client_calls_it(kind: str, role: str) -> None:
    name = PromptClasses().of(msgspec.structs.replace(a_call("c"), workflow_kind=kind, role=role))
    assert len(name) <= 65
    assert set(name) <= set(string.ascii_letters + string.digits + "_.-/")

"""What every head has to keep to: finite, monotone, the same by seed and after a load, and nothing foreign is read."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import swarmx.neural.heads
from swarmx.core.errors import PredictorError
from swarmx.neural.calibration import conformal_shifts
from swarmx.neural.checkpoint import load_arrays, load_head, middle_of, save_arrays, save_head
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.heads.length import length_spec
from swarmx.neural.net import QuantileNet
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings, TorchQuantileNet, fit

torch = pytest.importorskip("torch")

STORY: dict[str, Any] = {"licence": "Apache-2.0"}
QUICK = FitSettings(nets=2, hidden=8, epochs=4, patience=4, batch=64)


def specs() -> Iterator[HeadSpec]:
    """Every spec that a module of `swarmx.neural.heads` holds, alone or in a dict or tuple: a new head is found.

    That of the length head depends on the encoder before it.
    """
    yield length_spec(themes=8, experts=6)
    for module in pkgutil.iter_modules(swarmx.neural.heads.__path__, "swarmx.neural.heads."):
        for value in vars(importlib.import_module(module.name)).values():
            several = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            yield from (one for one in several if isinstance(one, HeadSpec))


SPECS = {spec.key: spec for spec in specs()}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)


def a_head(spec: HeadSpec, *, seed: int = 0, size: float = 0.3) -> Head:
    """Random networks: a head as bad as can be."""
    rng, n, k = np.random.default_rng(seed), len(spec.features), len(spec.levels)

    def normal(*shape: int) -> Any:
        return (size * rng.normal(size=shape)).astype(np.float32)

    nets = tuple(
        QuantileNet(
            hidden=normal(n, 8), hidden_bias=normal(8), out=normal(8, k), skip=normal(n, k), out_bias=normal(k),
            middle=middle_of(spec.levels),
        )
        for _ in range(2)
    )  # fmt: skip
    return Head(spec=spec, mean=normal(n), scale=np.abs(normal(n)) + 0.1, nets=nets, version=f"{spec.name}-{seed}")


def a_table(spec: HeadSpec, *, rows: int = 240, seed: int = 0) -> Table:
    """Outcomes that depend on the first feature, some unknown features, some censored rows, two groups."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, len(spec.features))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    anchor = rng.normal(2.0, 0.5, size=rows)
    effect = np.nan_to_num(x[:, 0]) * 0.5 + rng.normal(0.0, 0.3, size=rows)
    return Table(
        features=x,
        anchor=anchor,
        target=np.maximum(np.exp(anchor + effect) - spec.softening, 0.0),
        censored=rng.random(rows) < 0.1,
        weight=np.ones(rows),
        group=np.where(np.arange(rows) % 3 == 0, "a", "b"),
        split=np.where(np.arange(rows) % 4 == 0, "validation", "train"),
    )


@functools.cache
def trained(spec: HeadSpec) -> Head:
    """What a quick training makes of `a_table`."""
    return fit(a_table(spec), spec, QUICK)


def inputs(spec: HeadSpec, rows: int = 32, seed: int = 3) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0.0, 3.0, size=(rows, len(spec.features))).astype(np.float32)
    return x, rng.normal(1.0, 2.0, size=rows)


def same(a: Head, b: Head) -> bool:
    x, anchor = inputs(a.spec)
    return np.array_equal(a.log_quantiles(x, anchor, "a"), b.log_quantiles(x, anchor, "a"))


def test_there_are_heads_and_their_names_are_their_own() -> None:
    names = [spec.name for spec in SPECS.values()]
    assert names
    assert len(names) == len(set(names))


@EVERY
def test_a_spec_can_be_forecast(spec: HeadSpec) -> None:
    assert len(set(spec.features)) == len(spec.features) > 0
    assert spec.softening > 0.0
    assert all(0.0 < a < b < 1.0 for a, b in itertools.pairwise(spec.levels))


@EVERY
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_quantiles_are_finite_and_rise_whatever_comes_in(spec: HeadSpec, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    anything = st.floats(width=32, allow_nan=True, allow_infinity=True)
    x = data.draw(arrays.arrays(np.float32, (rows, len(spec.features)), elements=anything, fill=anything))
    anchor = data.draw(arrays.arrays(np.float64, rows, elements=st.floats(-50.0, 50.0)))
    head = a_head(spec, size=data.draw(st.sampled_from([0.01, 0.3, 3.0])))
    with np.errstate(all="ignore"):
        q = head.quantiles(x, anchor)
    assert q.shape == (rows, len(spec.levels))
    assert np.isfinite(q).all()
    assert (q >= 0.0).all()
    assert (np.diff(q, axis=1) >= 0.0).all()


@EVERY
def test_a_forecast_of_one_row_is_that_of_the_batch_in_the_unit_of_the_spec(spec: HeadSpec) -> None:
    head, (x, anchor) = a_head(spec), inputs(spec)
    forecast = head.forecast(x[0], float(anchor[0]))
    assert (forecast.unit, forecast.source, forecast.version) == (spec.unit, "neural", head.version)
    assert np.allclose(forecast.quantiles, head.quantiles(x, anchor)[0], rtol=1e-5)


@EVERY
def test_an_unknown_feature_counts_as_its_mean(spec: HeadSpec) -> None:
    head, (x, anchor) = a_head(spec), inputs(spec)
    unknown, usual = x.copy(), x.copy()
    unknown[:, 0], usual[:, 0] = np.nan, head.mean[0]
    assert np.allclose(head.log_quantiles(unknown, anchor), head.log_quantiles(usual, anchor), atol=1e-5)


@EVERY
def test_a_feature_far_out_is_held_at_the_limit(spec: HeadSpec) -> None:
    head, (x, anchor) = a_head(spec), inputs(spec)
    far, at_limit = x.copy(), x.copy()
    far[:, 0], at_limit[:, 0] = np.inf, head.mean[0] + head.limit * head.scale[0] * 2.0
    assert np.allclose(head.log_quantiles(far, anchor), head.log_quantiles(at_limit, anchor), atol=1e-4)


@EVERY
def test_a_network_in_numpy_is_that_of_torch(spec: HeadSpec) -> None:
    x, _ = inputs(spec, rows=64)
    torch.manual_seed(1)
    net = TorchQuantileNet(len(spec.features), 16, spec.levels, dropout=0.2).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
        golden = net(torch.from_numpy(x)).numpy()
    assert np.allclose(net.numpy()(x), golden, rtol=1e-4, atol=1e-4)


@EVERY
def test_a_trained_network_in_numpy_is_that_of_torch(spec: HeadSpec) -> None:
    head, (x, anchor) = trained(spec), inputs(spec)
    z = torch.from_numpy(np.clip((x - head.mean) / head.scale, -head.limit, head.limit))
    golden = np.zeros((len(x), len(spec.levels)))
    for net in head.nets:
        twin = TorchQuantileNet(len(spec.features), net.hidden.shape[1], spec.levels, dropout=0.0).eval()
        parts = ("hidden", "hidden_bias", "out", "skip", "out_bias")
        twin.load_state_dict({part: torch.from_numpy(getattr(net, part)) for part in parts})
        with torch.no_grad():
            golden += twin(z).numpy() / len(head.nets)
    assert np.allclose(head.log_quantiles(x, anchor), golden + anchor[:, None], rtol=1e-4, atol=1e-4)


@EVERY
def test_the_same_seed_gives_the_same_head_and_another_seed_another(spec: HeadSpec) -> None:
    assert same(trained(spec), fit(a_table(spec), spec, QUICK))
    assert not same(trained(spec), fit(a_table(spec), spec, _with_seed(1)))


def _with_seed(seed: int) -> FitSettings:
    return FitSettings(nets=2, hidden=8, epochs=4, patience=4, batch=64, seed=seed)


class PowerCut(Exception):
    """The training is broken off."""


FIRST, *OTHERS = SPECS.values()
BROKEN_OFF = [(FIRST, (0, 0)), (FIRST, (0, 3)), (FIRST, (1, 1)), *((spec, (0, 2)) for spec in OTHERS)]


@pytest.mark.parametrize(("spec", "after"), BROKEN_OFF, ids=lambda value: getattr(value, "name", str(value)))
def test_a_training_that_was_broken_off_ends_like_one_that_was_not(
    spec: HeadSpec, after: tuple[int, int], tmp_path: Path
) -> None:
    table = a_table(spec)

    def cut_off(net: int, epoch: int, loss: float) -> None:
        if (net, epoch) == after:
            raise PowerCut

    with pytest.raises(PowerCut):
        fit(table, spec, QUICK, resume=tmp_path, progress=cut_off)
    done: list[tuple[int, int]] = []
    resumed = fit(table, spec, QUICK, resume=tmp_path, progress=lambda net, epoch, loss: done.append((net, epoch)))
    assert after not in done
    assert same(resumed, trained(spec))


def test_the_training_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    fit(a_table(FIRST), FIRST, QUICK, resume=tmp_path)
    with pytest.raises(PredictorError, match="other settings"):
        fit(a_table(FIRST), FIRST, _with_seed(7), resume=tmp_path)


@EVERY
def test_too_few_rows_are_refused(spec: HeadSpec) -> None:
    with pytest.raises(PredictorError, match="give it more data"):
        fit(a_table(spec, rows=20), spec, QUICK)


@EVERY
def test_a_head_learns(spec: HeadSpec) -> None:
    table = a_table(spec, rows=1200)
    head = fit(table, spec, FitSettings(nets=1, hidden=8, epochs=12, batch=128, learning_rate=1e-2))
    x = np.full((2, len(spec.features)), np.nan, dtype=np.float32)
    x[:, 0] = (-1.5, 1.5)
    short, long = head.log_quantiles(x, np.array([2.0, 2.0]))[:, middle_of(spec.levels)]
    assert long - short > 0.3  # 1.5 in the data


@EVERY
def test_a_saved_head_is_the_same_when_loaded(spec: HeadSpec, tmp_path: Path) -> None:
    shifts = {"": np.linspace(-0.1, 0.2, len(spec.levels), dtype=np.float32)}
    shifts["a"] = shifts[""] * 3.0
    head = Head(**{**_fields(a_head(spec)), "shifts": shifts})
    card = save_head(tmp_path, head, STORY)
    loaded, read = load_head(tmp_path, spec)
    assert same(loaded, head)
    assert loaded.version == card.version == read.version
    assert read.spec == spec


def _fields(head: Head) -> dict[str, Any]:
    return {name: getattr(head, name) for name in ("spec", "mean", "scale", "nets", "shifts", "version", "limit")}


@EVERY
def test_the_version_is_that_of_the_weights(spec: HeadSpec, tmp_path: Path) -> None:
    cards = [save_head(tmp_path / str(i), a_head(spec, seed=seed), STORY) for i, seed in enumerate((0, 0, 1))]
    assert cards[0].version == cards[1].version != cards[2].version


@EVERY
@pytest.mark.parametrize("what", ["features", "order", "version", "unit", "softening", "levels"])
def test_a_head_for_another_spec_is_refused(spec: HeadSpec, what: str, tmp_path: Path) -> None:
    others: dict[str, HeadSpec] = {
        "features": msgspec.structs.replace(spec, features=(*spec.features, "one_more")),
        "order": msgspec.structs.replace(spec, features=spec.features[::-1]),
        "version": msgspec.structs.replace(spec, version=spec.version + 1),
        "unit": msgspec.structs.replace(spec, unit="work"),
        "softening": msgspec.structs.replace(spec, softening=spec.softening * 2.0),
        "levels": msgspec.structs.replace(spec, levels=spec.levels[1:]),
    }
    save_head(tmp_path, a_head(spec), STORY)
    with pytest.raises(PredictorError, match="train them again"):
        load_head(tmp_path, others[what])


@EVERY
@pytest.mark.parametrize(
    "damage",
    ["no weights", "no card", "empty weights", "cut short", "a flipped bit", "card cut short", "card of another"],
)
def test_a_damaged_checkpoint_is_refused(spec: HeadSpec, damage: str, tmp_path: Path) -> None:
    save_head(tmp_path, a_head(spec), STORY)
    weights, card = tmp_path / f"{spec.name}.safetensors", tmp_path / f"{spec.name}.json"
    raw = weights.read_bytes()
    match damage:
        case "no weights":
            weights.unlink()
        case "no card":
            card.unlink()
        case "empty weights":
            weights.write_bytes(b"")
        case "cut short":
            weights.write_bytes(raw[: len(raw) // 2])
        case "a flipped bit":
            weights.write_bytes(raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:])
        case "card cut short":
            card.write_bytes(card.read_bytes()[:80])
        case _:
            save_head(tmp_path / "other", a_head(spec, seed=1), STORY)
            card.write_bytes((tmp_path / "other" / card.name).read_bytes())
    with pytest.raises(PredictorError):
        load_head(tmp_path, spec)


@EVERY
@pytest.mark.parametrize("part", ["mean", "net0.out", "net1.skip"])
def test_an_incomplete_or_misshapen_checkpoint_is_refused_even_with_a_good_hash(
    spec: HeadSpec, part: str, tmp_path: Path
) -> None:
    save_head(tmp_path, a_head(spec), STORY)
    whole, card = load_arrays(tmp_path, spec.name)
    story = {**STORY, "spec": card.spec, "spec_key": card.spec_key}
    save_arrays(tmp_path, spec.name, {name: value for name, value in whole.items() if name != part}, story)
    with pytest.raises(PredictorError, match="incomplete"):
        load_head(tmp_path, spec)
    save_arrays(tmp_path, spec.name, {**whole, part: whole[part][:-1]}, story)
    with pytest.raises(PredictorError):
        load_head(tmp_path, spec)


@EVERY
def test_weights_that_are_not_numbers_are_refused(spec: HeadSpec, tmp_path: Path) -> None:
    head = a_head(spec)
    head.nets[0].out[0, 0] = np.nan
    save_head(tmp_path, head, STORY)
    with pytest.raises(PredictorError, match="not finite"):
        load_head(tmp_path, spec)


@EVERY
def test_conformal_shifts_keep_quantiles_rising_and_calibrate_them(spec: HeadSpec) -> None:
    head, table = a_head(spec), a_table(spec, rows=1200)
    shifted = Head(**{**_fields(head), "shifts": conformal_shifts(head, table, enough=300)})
    assert set(shifted.shifts) == {"", "a", "b"}
    x, anchor = inputs(spec)
    assert (np.diff(shifted.log_quantiles(x, anchor, "a"), axis=1) >= 0.0).all()
    rows = table.where(~table.censored)
    y = np.log(rows.target + spec.softening)
    q = shifted.log_quantiles(rows.features, rows.anchor, list(rows.group))
    for k, level in enumerate(spec.levels):
        assert math.isclose(float(np.mean(y <= q[:, k])), level, abs_tol=0.15)


@EVERY
def test_an_unknown_group_gets_the_shift_of_all(spec: HeadSpec) -> None:
    shift = np.full(len(spec.levels), 0.25, dtype=np.float32)
    head, (x, anchor) = a_head(spec), inputs(spec)
    shifted = Head(**{**_fields(head), "shifts": {"": shift, "a": shift * 4.0}})
    plain = head.log_quantiles(x, anchor)
    assert np.allclose(shifted.log_quantiles(x, anchor, "never seen"), plain + 0.25, atol=1e-5)
    assert np.allclose(shifted.log_quantiles(x, anchor, "a"), plain + 1.0, atol=1e-5)

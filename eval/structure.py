"""How well what a workflow still has before it is foreseen: `python -m eval.structure --sessions PATH --out DIR`.

Every moment of every test session is asked about (its beginning, each call's arrival, each answer): remaining calls,
remaining output tokens, remaining seconds. No task of the test split was trained on, with whatever model. Files under
a non-commercial licence may be given to be judged on, never to train what ships: `swarmx train` is not called here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from eval.result import Claim, Row, claim, table, write_result
from eval.structure_baselines import (
    Boosting,
    Mask,
    best_smoothing,
    boosted,
    boostings,
    constant,
    empirical,
    linear,
    samples_of,
)
from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Floats
from swarmx.neural.heads.structure import SPECS, recalled_quantiles, remaining_quantiles
from swarmx.neural.losses import coverage, crps, pinball
from swarmx.neural.table import Table
from swarmx.neural.training.fit import FitSettings, fit
from swarmx.neural.training.structure import (
    SETTINGS,
    Session,
    StructureRows,
    load_sessions,
    rows_of,
    where,
)

OURS = "swarmx"
_EMPIRICAL = "empirical_kind_steps"
_RESAMPLES = 300
_FEWEST = 8  # sessions of a family that is left out


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.structure", description=__doc__)
    parser.add_argument("--sessions", type=Path, required=True, help="a file of agent sessions, or its folder")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of ours; their mean loss is compared")
    parser.add_argument("--quantities", type=_names, default=list(SPECS), help="of calls, work, path; by comma")
    parser.add_argument("--quick", action="store_true", help="one network, few epochs, remaining calls only")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and result.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, claims = structure_rows(options.sessions, list(range(options.seeds)), options.quick, options.quantities)
    command = " ".join(["python -m eval.structure", *(sys.argv[1:] if arguments is None else arguments)])
    files = [options.sessions] if options.sessions.is_file() else sorted(options.sessions.glob("sessions.parquet"))
    path = write_result(options.out, command, rows, claims, list(range(options.seeds)), files)
    print(table(rows))
    for made in claims:
        print(f"{made.name}: {made.value:.3f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    print(f"Written to {path}.")
    return 0


def structure_rows(
    path: Path, seeds: Sequence[int], quick: bool = False, quantities: Sequence[str] = tuple(SPECS)
) -> tuple[list[Row], list[Claim]]:
    """All comparisons on the frozen test split, and on kinds that were left out of training."""
    sessions = load_sessions(path)
    rows = rows_of(sessions)
    settings = replace(SETTINGS, nets=1, epochs=8) if quick else SETTINGS
    results: list[Row] = []
    for quantity in ("calls",) if quick else quantities:
        results += _compare(rows, quantity, seeds, settings, quick)
    results += _unseen_kinds(sessions, quick)
    return results, list(claims_of(results))


def claims_of(rows: Sequence[Row]) -> Iterator[Claim]:
    """Ours against the best baseline and against the empirical one, on the test split as a whole."""
    for quantity in SPECS:
        for experiment, suffix in (("structure", ""), ("structure_unseen_kind", "unseen_kind")):
            losses: dict[str, list[float]] = {}
            for row in rows:
                if (row["experiment"], row["quantity"], row["part"]) == (experiment, quantity, "all"):
                    losses.setdefault(str(row["method"]), []).append(_number(row["pinball"]))
            if OURS not in losses:
                continue
            mean = {method: float(np.mean(values)) for method, values in losses.items()}
            ours = mean.pop(OURS)
            mean.pop("memory_alone", None)
            conditions = [part for part in ("" if quantity == "calls" else quantity, suffix) if part]
            yield claim(_name(*conditions), ours / min(mean.values()), "<=", 0.9)
            yield claim(_name("empirical", *conditions), ours / mean[_EMPIRICAL], "<=", 0.9)


def _name(*conditions: str) -> str:
    return "@".join(["structure_pinball_vs_best", *(["-".join(conditions)] if conditions else [])])


def _compare(
    rows: StructureRows, quantity: str, seeds: Sequence[int], settings: FitSettings, quick: bool
) -> Iterator[Row]:
    """One quantity on the test split: all moments, by domain, and one model's part."""
    rows = where(rows, np.isfinite(rows.tables[quantity].target))
    spec, asked = SPECS[quantity], rows.tables[quantity]
    test = (asked.split == "test") & (rows.known == "all")
    methods = dict(_baselines(rows, quantity, test, quick))
    empirical_loss = _losses(asked.where(test), methods[_EMPIRICAL])
    whole = rows.model[test] == ""
    for method, quantiles in methods.items():
        yield from _scores(rows, quantity, test, method, None, quantiles, not quick)
    for seed in seeds:
        head = fit(asked, spec, replace(settings, seed=seed))
        part = asked.where(test)
        quantiles = remaining_quantiles(head, part.features, rows.recalled[quantity][test])
        low, high = _interval(_losses(part, quantiles)[whole], empirical_loss[whole], rows.session[test][whole])
        for row in _scores(rows, quantity, test, OURS, seed, quantiles, not quick):
            yield {**row, "vs_empirical_low": low, "vs_empirical_high": high} if row["part"] == "all" else row


def _baselines(rows: StructureRows, quantity: str, test: Mask, quick: bool) -> Iterator[tuple[str, Floats]]:
    asked, softening = rows.tables[quantity], SPECS[quantity].softening
    once = rows.known == "all"
    answered = once & ~rows.waiting
    samples = samples_of(rows, quantity)
    train = samples.at(answered & (asked.split == "train"))
    validation = samples.at(answered & (asked.split == "validation") & (rows.model == ""))
    yield "global", constant(train, samples.at(test))
    yield "per_kind", constant(train, samples.at(test), "kind")
    smoothing = best_smoothing(train, validation)
    yield _EMPIRICAL, empirical(train, samples.at(test), smoothing)
    part = asked.where(test)
    yield "memory_alone", recalled_quantiles(rows.recalled[quantity][test], quantity)
    yield "linear_quantile", linear(asked.where(once), softening, part)
    choices = [Boosting(7, True)] if quick else list(boostings())
    held = asked.where(once & (asked.split == "validation") & (rows.model == ""))
    best = choices[0]
    if len(choices) > 1:
        best = min(choices, key=lambda c: _losses(held, boosted(asked.where(once), softening, c, held)).mean())
    yield "lightgbm", boosted(asked if not quick else asked.where(once), softening, best, part)


def _scores(
    rows: StructureRows, quantity: str, test: Mask, method: str, seed: int | None, quantiles: Floats, detail: bool
) -> Iterator[Row]:
    target = rows.tables[quantity].target[test]
    whole = rows.model[test] == ""
    parts = {"all": whole}
    if detail:
        waiting = rows.waiting[test]
        parts |= {"at_arrival": whole & waiting, "after_answer": whole & ~waiting}
        if quantity != "path":
            parts["one_model"] = ~whole
        families = _families(rows.dataset[test], rows.domain[test])
        parts |= {f"family:{name}": whole & (families == name) for name in np.unique(families)}
    for part, chosen in parts.items():
        if chosen.any():
            yield _row("structure", quantity, method, part, seed, target[chosen], quantiles[chosen],
                       len(np.unique(rows.session[test][chosen])))  # fmt: skip


def _row(
    experiment: str, quantity: str, method: str, part: str, seed: int | None, target: Floats, quantiles: Floats, n: int
) -> Row:
    return {
        "experiment": experiment,
        "quantity": quantity,
        "method": method,
        "part": part,
        "seed": seed,
        "sessions": n,
        "rows": len(target),
        "pinball": float(pinball(target, quantiles, LEVELS).mean()),
        "crps": float(crps(target, quantiles, LEVELS).mean()),
        **{f"coverage_{round(100 * level)}": coverage(target, quantiles, LEVELS, level) for level in (0.5, 0.9, 0.99)},
    }


def _unseen_kinds(sessions: Sequence[Session], quick: bool) -> Iterator[Row]:
    """Each family of kinds in turn is left out of training and memory, then all its sessions are asked about.

    Ours is the memory of all other workflows then, by rule: see `remaining_quantiles`.
    """
    quantity = "calls"
    named = _families(np.array([s.dataset for s in sessions]), np.array([s.domain for s in sessions]))
    names, counts = np.unique(named, return_counts=True)
    families = [str(name) for name, count in zip(names, counts, strict=True) if count >= _FEWEST]
    totals: dict[str, list[tuple[Floats, Floats, int]]] = {}
    for left_out in families[:1] if quick else families:
        asked_sessions = [
            replace(s, split="test") if family == left_out else s for s, family in zip(sessions, named, strict=True)
        ]
        rows = rows_of(asked_sessions, copies=False)
        family = _families(rows.dataset, rows.domain)
        of_part = (family == left_out) | (rows.tables[quantity].split != "test")
        rows = where(rows, of_part & ((rows.model == "") | (rows.tables[quantity].split != "test")))
        asked = rows.tables[quantity]
        test = asked.split == "test"
        methods = dict(_baselines(rows, quantity, test, quick=True))
        part = asked.where(test)
        methods[OURS] = methods.pop("memory_alone")
        for method, quantiles in methods.items():
            count = len(np.unique(rows.session[test]))
            totals.setdefault(method, []).append((part.target, quantiles, count))
            yield _row("structure_unseen_kind", quantity, method, f"family:{left_out}", None, part.target, quantiles,
                       count)  # fmt: skip
    for method, parts in totals.items():
        target, quantiles = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        yield _row("structure_unseen_kind", quantity, method, "all", None, target, quantiles, sum(p[2] for p in parts))


def _families(dataset: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Runs of one harness in one domain, whatever the model; the many small domains of one file together."""
    return np.array(
        [f"tau2/{b}" if a.startswith("tau2:") else a for a, b in zip(dataset.tolist(), domain.tolist(), strict=True)]
    )


def _losses(rows: Table, quantiles: Floats) -> Floats:
    loss: Floats = pinball(rows.target, quantiles, LEVELS).mean(axis=1)
    return loss


def _interval(ours: Floats, theirs: Floats, session: np.ndarray) -> tuple[float, float]:
    """The middle 90 % of the ratio of losses, over sessions drawn again with replacement."""
    _, number = np.unique(session, return_inverse=True)
    a, b = np.bincount(number, weights=ours), np.bincount(number, weights=theirs)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(a), size=(_RESAMPLES, len(a)))
    low, high = np.quantile(a[drawn].sum(axis=1) / b[drawn].sum(axis=1), (0.05, 0.95)).tolist()
    return low, high


def _names(text: str) -> list[str]:
    return text.split(",")


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value


if __name__ == "__main__":
    sys.exit(main())

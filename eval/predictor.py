"""How well output lengths are foreseen, against every baseline at its best settings.

    python -m eval.predictor --prompts DIR --out DIR [--seeds 0 1 2] [--quick] [--extra DIR ...] [--weights DIR]

`--prompts` is a folder with prompts.parquet and lengths.parquet; ours and the baselines learn from its train prompts
and models, stop and choose settings by its validation prompts, and are asked about its test prompts: of models they
know (unseen_prompts), of test models of which they know nothing (unseen_models_cold) or 50 answers to train prompts
(unseen_models_50; test models with fewer are left out and counted). The baselines are fitted anew with the 50 answers,
our memory only takes note of them. The best baseline is the one that is best on the test rows: chosen against us.

`--extra` folders are asked about only: of the weights in `--weights`, or those that ship, before and after 50 answers
of each model to other prompts of that folder. Nothing is trained on them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from eval.baselines.columns import Text, prompts_of
from eval.baselines.empirical import Rows, capped, losses, pairs_of
from eval.baselines.regression import Learner
from eval.baselines.suite import (
    LEARNERS,
    OBSERVATIONS,
    QUICK,
    Asked,
    Choices,
    Few,
    Forecasts,
    Suite,
    choose,
    indices,
)
from eval.length_scores import over_seeds, plot_calibration, plot_pinball, ratio_interval, scores
from eval.result import Claim, Row, claim, table, write_result
from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.head import Floats, Head
from swarmx.neural.heads.length import LengthMemory
from swarmx.neural.training.hashed import HashedSettings
from swarmx.neural.training.lengths import LengthData, Lengths, ask, encode_all, read_lengths, teach
from swarmx.neural.training.run import LENGTH_SETTINGS, train_length

OURS = "swarmx"
_QUICK_BITS = 12
_AIM = 0.92
_FEWEST_OF_CATEGORY = 100
_LEARNERS_ELSEWHERE: tuple[tuple[Learner, Text], ...] = (
    ("linear", "svd+effect"),
    ("linear", "embedding_oof"),
    ("lightgbm", "svd"),
    ("lightgbm", "svd+effect"),
    ("lightgbm", "embedding_oof"),
)

Progress = Callable[[str], None]


@dataclass(slots=True)
class Regime:
    """Rows that are asked about under one condition, and each method's quantiles [rows, K] by seed."""

    name: str
    lengths: Lengths
    rows: Rows
    few: Few
    left_out: int = 0
    found: dict[str, list[Floats]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    def add(self, method: str, kind: str, setting: str, quantiles: Floats) -> None:
        self.found.setdefault(method, []).append(quantiles)
        self.kinds[method] = kind
        self.settings.setdefault(method, setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """What forecasts on our side: an encoder, what the memory knows, the head."""

    encoder: HashedEncoder
    memory: LengthMemory
    head: Head
    version: str

    def asked(self, lengths: Lengths, rows: Rows, few: Few, memory: LengthMemory) -> tuple[Asked, Floats]:
        """The features of these rows, and our quantiles [rows, K] in tokens."""
        vectors = encode_all(self.encoder, lengths.bags)
        features, anchor = ask(memory, self.encoder, vectors, lengths, rows)
        groups = [f"kind{self.encoder.kind_of(vectors[i])}" for i in lengths.prompt[rows]]
        return Asked(rows, few, features, anchor), self.head.quantiles(features, anchor, groups)

    def taught(self, lengths: Lengths, rows: Rows) -> LengthMemory:
        """A copy of the memory that has seen these rows, too."""
        memory = self.memory.copy()
        teach(memory, self.encoder, encode_all(self.encoder, lengths.bags), lengths, rows)
        return memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.predictor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, help="folder with prompts.parquet and lengths.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="trainings and draws of the 50 answers")
    parser.add_argument("--quick", action="store_true", help="one seed, small networks, fewer baselines untuned")
    parser.add_argument("--extra", type=Path, nargs="*", default=[], help="folders that are asked about only")
    parser.add_argument("--weights", type=Path, help="of our predictor for --extra; those that ship by default")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json, result.md and the plots")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    log = Console(stderr=True).log
    seeds = options.seeds[:1] if options.quick else options.seeds
    regimes = compare(options.prompts, seeds, options.extra, options.weights, quick=options.quick, progress=log)
    rows = [row for regime in regimes for row in rows_of(regime, detail=not options.quick)]
    claims = list(claims_of(rows))
    command = " ".join(["python -m eval.predictor", *(sys.argv[1:] if arguments is None else arguments)])
    files = [path for folder in (options.prompts, *options.extra) for path in files_of(folder)]
    path = write_result(options.out, command, rows, claims, seeds, files)
    plot_pinball(rows, options.out / "pinball.png")
    plot_calibration({regime.name: _calibration(regime) for regime in regimes}, options.out / "calibration.png")
    print(table([{k: v for k, v in row.items() if k not in _NOT_SHOWN} for row in rows if row.get("part") == "all"]))
    print(table([row for row in rows if row["experiment"] == "predictor_ratio"]))
    for made in claims:
        print(f"{made.name}: {made.value:.3f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    print(f"Written to {path}.")
    return 0


_NOT_SHOWN = ("experiment", "part", "setting", "left_out_models", "prompts")


def compare(
    folder: Path,
    seeds: Sequence[int],
    extra: Sequence[Path] = (),
    weights: Path | None = None,
    *,
    quick: bool = False,
    progress: Progress = lambda text: None,
) -> list[Regime]:
    """All methods under all conditions; the settings of the baselines are chosen once, with the first seed."""
    settings = HashedSettings(bits=_QUICK_BITS) if quick else HashedSettings()
    lengths = _read(folder, settings.bits)
    known, held = indices(lengths, "train", "train"), indices(lengths, "validation", "train")
    regimes = [
        Regime("unseen_prompts", lengths, indices(lengths, "test", "train"), "all"),
        Regime("unseen_models_cold", lengths, indices(lengths, "test", "test"), "none"),
        _after_some(lengths),
    ]
    others: list[Regime] = []
    choices: Choices | None = None
    for seed in seeds:
        head_settings = replace(LENGTH_SETTINGS, epochs=3) if quick else LENGTH_SETTINGS
        data, head = train_length(lengths, seed=seed, encoder=settings, settings=head_settings, progress=progress)
        rng = np.random.default_rng(seed)
        # What is known comes in any order; the memory that training leaves has met the validation models last.
        blank = LengthMemory(kind_means=data.memory.kind_means, kind_spreads=data.memory.kind_spreads,
                             doubts=data.memory.doubts)  # fmt: skip
        ours = Ours(encoder=data.encoder, memory=blank, head=head, version=f"trained with seed {seed}")
        ours = replace(ours, memory=ours.taught(lengths, rng.permutation(known)))
        prompts = prompts_of(lengths, data)
        if choices is None:
            choices = choose(lengths, prompts, data, quick=quick, progress=progress)
        suite = Suite(
            lengths=lengths, prompts=prompts, data=data, choices=choices, seed=seed,
            learners=QUICK if quick else LEARNERS,
        )  # fmt: skip
        drawn = _drawn(lengths, indices(lengths, "train", "test"), rng)
        _ask(suite, ours, regimes[:2], known, held, known[:0], progress)
        _ask(suite, ours, regimes[2:], known, held, drawn, progress)
        if not others:
            for path in extra:
                others += _elsewhere(path, suite, _shipped(weights) or ours, quick=quick, progress=progress)
    return [regime for regime in (*regimes, *others) if len(regime.rows)]


def _after_some(lengths: Lengths) -> Regime:
    """Test prompts of the test models of which there are enough answers to train prompts."""
    asked, pool = indices(lengths, "test", "test"), indices(lengths, "train", "test")
    enough = [lengths.model[rows[0]] for rows in pairs_of(lengths, pool, OBSERVATIONS, np.random.default_rng(0))]
    rows = asked[np.isin(lengths.model[asked], enough)]
    left_out = len(np.unique(lengths.model[asked])) - len(np.unique(lengths.model[rows]))
    return Regime("unseen_models_50", lengths, rows, "50", left_out)


def _drawn(lengths: Lengths, pool: Rows, rng: np.random.Generator) -> Rows:
    drawn = list(pairs_of(lengths, pool, OBSERVATIONS, rng))
    return rng.permutation(np.concatenate(drawn)) if drawn else pool[:0]


def _ask(
    suite: Suite,
    ours: Ours,
    regimes: Sequence[Regime],
    known: Rows,
    held: Rows,
    drawn: Rows,
    progress: Progress,
    bounds: bool = True,
) -> None:
    """Ask everybody about these regimes, after `drawn` became known, too."""
    regimes = [regime for regime in regimes if len(regime.rows)]
    if not regimes:
        return
    memory = ours.taught(suite.lengths, drawn) if len(drawn) else ours.memory
    asked: list[Asked] = []
    for regime in regimes:
        part, quantiles = ours.asked(suite.lengths, regime.rows, regime.few, memory)
        asked.append(part)
        regime.add(OURS, "ours", ours.version, quantiles)
    for made in suite.forecasts(np.concatenate([known, drawn]), held, asked, bounds=bounds):
        _keep(made, regimes, progress)


def _keep(made: Forecasts, regimes: Sequence[Regime], progress: Progress) -> None:
    for regime, quantiles in zip(regimes, made.quantiles, strict=True):
        regime.add(made.method, made.kind, made.setting, quantiles)
        both = [losses(regime.lengths, regime.rows, q).mean() for q in (quantiles, regime.found[OURS][-1])]
        progress(f"{regime.name}: {made.method} {both[0]:.3f}, ours {both[1]:.3f}")


def _elsewhere(folder: Path, suite: Suite, ours: Ours, *, quick: bool, progress: Progress) -> list[Regime]:
    """Another folder's prompts, all of them new, of its models: before and after 50 answers to others of its prompts.

    Prompts of the frozen train split give the 50 answers, the others are asked about; texts that were trained on are
    left out. The baselines are those of the first seed, fitted to `suite.lengths` and the 50 answers.
    """
    home = suite.lengths
    known, held = indices(home, "train", "train"), indices(home, "validation", "train")
    foreign = _read(folder, suite.data.encoder.bits)
    lengths = joined(home, foreign)
    trained_on = {text for text, split in zip(home.texts, home.prompt_split, strict=True) if split == "train"}
    new = np.array([text not in trained_on for text in foreign.texts])[foreign.prompt]
    pool = foreign.prompt_split[foreign.prompt] == "train"
    shift = len(home.tokens)
    asked = np.flatnonzero(new & ~pool) + shift
    drawn = _drawn(lengths, np.flatnonzero(pool) + shift, np.random.default_rng(0))
    enough = np.unique(lengths.model[drawn]) if len(drawn) else np.zeros(0, dtype=lengths.model.dtype)
    after = asked[np.isin(lengths.model[asked], enough)]
    left_out = len(np.unique(lengths.model[asked])) - len(np.unique(lengths.model[after]))
    cold = Regime(f"extra:{folder.name}_cold", lengths, asked, "none")
    later = Regime(f"extra:{folder.name}_50", lengths, after, "50", left_out)
    vectors = np.concatenate([suite.data.vectors, encode_all(suite.data.encoder, foreign.bags)])
    data: LengthData = replace(suite.data, vectors=vectors)
    learners = QUICK[:1] if quick else _LEARNERS_ELSEWHERE
    wide = replace(suite, lengths=lengths, data=data, prompts=prompts_of(lengths, data), learners=learners)
    if ours.encoder.bits != suite.data.encoder.bits:
        raise PredictorError(
            f"the weights {ours.version} have an encoder of {ours.encoder.bits} bits, this run reads prompts with "
            f"{suite.data.encoder.bits}; leave --quick out, or train them again."
        )
    _ask(wide, ours, [cold], known, held, known[:0], progress, bounds=False)
    _ask(wide, ours, [later], known, held, drawn, progress, bounds=False)
    return [cold, later]


def joined(first: Lengths, second: Lengths) -> Lengths:
    """Both, the rows and prompts of `first` first; the prompts of `second` are in the split "extra"."""
    return Lengths(
        prompt=np.concatenate([first.prompt, second.prompt + len(first.texts)]),
        model=np.concatenate([first.model, second.model]),
        role=np.concatenate([first.role, second.role]),
        tokens=np.concatenate([first.tokens, second.tokens]),
        limit=np.concatenate([first.limit, second.limit]),
        model_split=np.concatenate([first.model_split, second.model_split]),
        prompt_split=np.concatenate([first.prompt_split, np.full(len(second.texts), "extra")]),
        texts=first.texts + second.texts,
        bags=first.bags + second.bags,
    )


def files_of(folder: Path) -> list[Path]:
    """prompts.parquet and lengths.parquet of a folder, or the one file each whose name begins so."""
    found: list[Path] = []
    for name in ("prompts", "lengths"):
        choices = [folder / f"{name}.parquet"] if (folder / f"{name}.parquet").exists() else sorted(
            folder.glob(f"{name}_*.parquet")
        )  # fmt: skip
        if len(choices) != 1:
            raise PredictorError(
                f"{folder} holds {len(choices)} files {name}_*.parquet and no {name}.parquet; expected one of them."
            )
        found += choices
    return found


def _read(folder: Path, bits: int) -> Lengths:
    with tempfile.TemporaryDirectory() as place:
        for path in files_of(folder):
            (Path(place) / f"{path.name.split('.')[0].split('_')[0]}.parquet").symlink_to(path.resolve())
        return read_lengths(Path(place), bits)


def _shipped(weights: Path | None) -> Ours | None:
    """The weights in a folder, or those that ship; None where none ship."""
    try:
        found = NeuralForecaster.load(weights)
    except PredictorError:
        if weights is not None:
            raise
        return None
    return Ours(encoder=found.encoder, memory=found.memory, head=found.head, version=found.version)


def rows_of(regime: Regime, *, detail: bool = True) -> Iterator[Row]:
    """Scores of every method as medians over the seeds, in all and by category; then ours relative to each other."""
    lengths, rows = regime.lengths, regime.rows
    parts = {"all": np.ones(len(rows), dtype=np.bool_)}
    if detail:
        categories, counts = np.unique(lengths.role[rows], return_counts=True)
        for category in categories[counts >= _FEWEST_OF_CATEGORY]:
            parts[f"category:{category}"] = lengths.role[rows] == category
    for part, chosen in parts.items():
        for method, many in regime.found.items():
            numbers = over_seeds([scores(lengths, rows[chosen], q[chosen]) for q in many])
            yield {
                "experiment": "predictor", "regime": regime.name, "part": part, "method": method,
                "kind": regime.kinds[method], "seeds": len(many), "rows": int(chosen.sum()),
                "prompts": len(np.unique(lengths.prompt[rows[chosen]])), "left_out_models": regime.left_out, **numbers,
                "setting": regime.settings[method],
            }  # fmt: skip
    mean = {m: np.mean([losses(lengths, rows, q) for q in many], axis=0) for m, many in regime.found.items()}
    for method, theirs in mean.items():
        if method != OURS:
            ratio, low, high = ratio_interval(mean[OURS], theirs, lengths.prompt[rows])
            yield {
                "experiment": "predictor_ratio", "regime": regime.name, "method": method, "kind": regime.kinds[method],
                "ours_vs_it": ratio, "low": low, "high": high,
            }  # fmt: skip


def claims_of(rows: Sequence[Row]) -> Iterator[Claim]:
    """The aims, as far as the rows speak about them; the best baseline is the one that is best on these rows."""
    regimes = dict.fromkeys(str(row["regime"]) for row in rows)
    for regime in regimes:
        mine = [row for row in rows if row["regime"] == regime and row.get("kind") in ("baseline", "ours")]
        ratios = {str(r["method"]): _number(r["ours_vs_it"]) for r in mine if r["experiment"] == "predictor_ratio"}
        aim = 1.0 if regime.endswith("_cold") or regime.startswith("extra:") else _AIM
        yield claim(f"pinball_vs_best_non_neural@{regime}", max(ratios.values()), "<=", aim)
        if "lightgbm_svd" in ratios:
            yield claim(f"pinball_vs_lightgbm_svd@{regime}", ratios["lightgbm_svd"], "<=", aim)
        whole = {str(r["method"]): r for r in mine if r.get("part") == "all"}
        taus = {method: _number(row["kendall_tau"]) for method, row in whole.items()}
        ours = taus.pop(OURS)
        yield claim(f"kendall_tau_gain@{regime}", ours - max(taus.values()), ">", 0.0)
        if regime == "unseen_prompts":
            for level, most in ((50, 2.0), (90, 2.0), (99, 0.5)):
                error = abs(100.0 * _number(whole[OURS][f"coverage_{level}"]) - level)
                yield claim(f"coverage_error_points@{level}", error, "<=", most)


def _calibration(regime: Regime) -> dict[str, list[float]]:
    """Shares of outcomes at or below each level, of ours and the best baseline, the seeds together."""
    tokens = regime.lengths.tokens[regime.rows]
    mean = {
        method: float(np.mean([losses(regime.lengths, regime.rows, q).mean() for q in many]))
        for method, many in regime.found.items()
        if regime.kinds[method] == "baseline"
    }
    return {
        method: [
            float(np.mean([tokens <= capped(regime.lengths, regime.rows, q)[:, k] for q in regime.found[method]]))
            for k in range(len(LEVELS))
        ]
        for method in (OURS, min(mean, key=lambda name: mean[name]))
    }


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value


if __name__ == "__main__":
    sys.exit(main())

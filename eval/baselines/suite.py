"""All baselines together: their settings, chosen on validation rows, and their forecasts for what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

import numpy as np

from eval.baselines.columns import (
    Design,
    Ground,
    Prompts,
    Text,
    features_design,
    table_design,
    with_other_answers,
)
from eval.baselines.empirical import (
    Grouping,
    Histogram,
    Rows,
    grouped,
    groupings,
    histogram,
    histograms,
    losses,
)
from eval.baselines.regression import Learner, Settings, forecast
from swarmx.neural.head import Floats
from swarmx.neural.net import Floats32
from swarmx.neural.training.lengths import LengthData, Lengths

Kind = Literal["baseline", "ablation", "bound"]
Few = Literal["all", "none", "50"]

OBSERVATIONS = 50
_RIDGES = (0.3, 1.0, 3.0)
_STRANGERS_KEPT = 0.3

LEARNERS: tuple[tuple[Learner, Text], ...] = (
    ("linear", "svd"),
    ("linear", "svd+effect"),
    ("linear", "embedding"),
    ("linear", "embedding_oof"),
    ("lightgbm", "svd"),
    ("lightgbm", "svd+effect"),
    ("lightgbm", "embedding"),
    ("lightgbm", "embedding_oof"),
    ("xgboost", "svd"),
    ("xgboost", "svd+effect"),
    ("xgboost", "embedding"),
    ("xgboost", "embedding_oof"),
)
QUICK: tuple[tuple[Learner, Text], ...] = (
    ("linear", "svd+effect"),
    ("lightgbm", "svd"),
    ("lightgbm", "embedding_oof"),
    ("xgboost", "svd+effect"),
)
_STARTS: dict[Learner, Settings] = {
    "linear": Settings(),
    "lightgbm": Settings(),
    "xgboost": Settings(rate=0.1, rounds=300),  # eight trees a round
}
_STEPS: dict[Learner, tuple[Mapping[str, float | bool], ...]] = {
    "linear": ({"emphasis": 0.0}, {"emphasis": 0.5}, {"decay": 0.1}, {"decay": 1.0}, {"over_anchor": False}),
    "lightgbm": (
        {"emphasis": 0.0}, {"emphasis": 0.5}, {"identity": False}, {"over_anchor": False}, {"leaves": 31},
        {"leaves": 7}, {"least_rows": 50},
    ),
    "xgboost": ({"emphasis": 0.5}, {"identity": False}, {"leaves": 31}, {"leaves": 7}, {"least_rows": 50}),
}  # fmt: skip


class Forecasts(NamedTuple):
    """[asked, K] quantiles in tokens, in the order of what was asked."""

    method: str
    kind: Kind
    setting: str
    quantiles: list[Floats]


class Asked(NamedTuple):
    """Rows that are asked about, how many answers of their models are known, and our features of these rows."""

    rows: Rows
    few: Few
    features: Floats32
    anchor: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Settings by method, and for the empirical ones by how many answers of the model are known."""

    grouping: dict[tuple[str, Few], Grouping] = field(default_factory=dict)
    histogram: dict[tuple[str, Few], Histogram] = field(default_factory=dict)
    learner: dict[Learner, Settings] = field(default_factory=lambda: dict(_STARTS))
    ridge: float = 1.0


def indices(lengths: Lengths, prompt_split: str, model_split: str) -> Rows:
    """The rows of these splits, by number."""
    return np.flatnonzero(lengths.rows(prompt_split, model_split))


def rehearsal(lengths: Lengths, few: Few, seed: int = 0) -> tuple[Rows, Rows, Rows]:
    """Rows to learn from, validation rows to be asked, and those of them whose models are strangers.

    Of every other train model nothing ("none") or `OBSERVATIONS` answers are known.
    """
    known, asked = indices(lengths, "train", "train"), indices(lengths, "validation", "train")
    if few == "all":
        return known, asked, asked[:0]
    rng = np.random.default_rng(seed)
    models = rng.permutation(np.unique(lengths.model[known]))[::2]
    strange = np.isin(lengths.model[known], models)
    kept = [known[~strange]]
    if few == "50":
        for model in models:
            of_model = known[lengths.model[known] == model]
            kept.append(rng.choice(of_model, min(OBSERVATIONS, len(of_model)), replace=False))
    return np.sort(np.concatenate(kept)), asked, asked[np.isin(lengths.model[asked], models)]


def choose(
    lengths: Lengths, prompts: Prompts, data: LengthData, *, quick: bool, progress: Callable[[str], None]
) -> Choices:
    """The settings of every baseline with the least pinball loss in tokens on validation rows."""
    grouping: dict[tuple[str, Few], Grouping] = {}
    moving: dict[tuple[str, Few], Histogram] = {}
    fews: tuple[Few, ...] = ("all", "none", "50")
    for few in fews:
        known, asked, strange = rehearsal(lengths, few)
        rows = strange if len(strange) else asked
        for group in ("", "category", "model", "model_category"):
            grouping[group, few] = min(
                groupings(group),
                key=lambda c: losses(lengths, rows, grouped(lengths, known, rows, c)).mean(),
            )
        for by_model in (False, True):
            moving[f"{by_model}", few] = min(
                histograms(by_model=by_model),
                key=lambda c: losses(lengths, rows, histogram(lengths, known, rows, c)).mean(),
            )
    known, asked, _ = rehearsal(lengths, "all")
    ridge = max(_RIDGES, key=lambda r: Ground(lengths, prompts, data, "svd+effect", known, ridge=r).explained(asked))
    progress(f"ridge {ridge}")
    if quick:
        fast = {name: replace(start, rounds=15, rate=0.3, epochs=4) for name, start in _STARTS.items()}
        return Choices(grouping=grouping, histogram=moving, ridge=ridge, learner=fast)
    known, asked, _ = rehearsal(lengths, "50")
    ground = Ground(lengths, prompts, data, "svd+effect", known, ridge=ridge)
    train, held = ground.train(), ground.asked(asked)
    chosen = {learner: _climbed(learner, lengths, asked, train, held, progress) for learner in _STARTS}
    return Choices(grouping=grouping, histogram=moving, ridge=ridge, learner=chosen)


def _climbed(
    learner: Learner, lengths: Lengths, rows: Rows, train: Design, held: Design, progress: Callable[[str], None]
) -> Settings:
    """Each step away from the start is tried alone, those that help together; larger learning rates save time."""

    def loss(settings: Settings) -> float:
        hasty = replace(settings, rate=0.15, rounds=120)
        (quantiles,) = forecast(learner, train, held, [held], hasty, 0)
        value = float(losses(lengths, rows, quantiles).mean())
        progress(f"{learner} {said(settings)}: {value:.3f}")
        return value

    start = best = _STARTS[learner]
    least = first = loss(start)
    gains: dict[str, tuple[float, float | bool]] = {}
    for step in _STEPS[learner]:
        ((name, value),) = step.items()
        tried = replace(start, **{name: value})  # type: ignore[arg-type]
        now = loss(tried)
        if now < first and now < gains.get(name, (first, 0.0))[0]:
            gains[name] = (now, value)
        if now < least:
            best, least = tried, now
    if len(gains) > 1:
        together = replace(start, **{name: value for name, (_, value) in gains.items()})  # type: ignore[arg-type]
        if loss(together) < least:
            best = together
    return best


def said(settings: Settings) -> str:
    """The settings in few words: what differs from the start."""
    start = Settings()
    names = [field_.name for field_ in fields(settings)]
    changed = [f"{n}={getattr(settings, n)}" for n in names if getattr(settings, n) != getattr(start, n)]
    return ", ".join(changed) or "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Everything that forecasts, but ours: `known` rows to learn from, `held` rows to stop by."""

    lengths: Lengths
    prompts: Prompts
    data: LengthData
    choices: Choices
    learners: Sequence[tuple[Learner, Text]] = LEARNERS
    seed: int = 0

    def forecasts(self, known: Rows, held: Rows, asked: Sequence[Asked], *, bounds: bool) -> Iterator[Forecasts]:
        """Of each method in turn; `bounds` adds the ablation and the oracle."""
        yield from self._empirical(known, asked)
        grounds: dict[Text, tuple[Ground, Design, Design]] = {}
        for learner, text in self.learners:
            if text not in grounds:
                ground = self._ground(text, known)
                grounds[text] = (ground, ground.train(), ground.asked(held))
            ground, train, stopping = grounds[text]
            designs = [ground.asked(part.rows) for part in asked]
            settings = self.choices.learner[learner]
            quantiles = forecast(learner, train, stopping, designs, settings, self.seed)
            yield Forecasts(f"{learner}_{text}", "baseline", said(settings), quantiles)
        if bounds:
            yield self._ablation(asked)
            yield self._oracle(known, held, asked)

    def _ground(self, text: Text, known: Rows) -> Ground:
        return Ground(self.lengths, self.prompts, self.data, text, known, ridge=self.choices.ridge, seed=self.seed)

    def _empirical(self, known: Rows, asked: Sequence[Asked]) -> Iterator[Forecasts]:
        names = {"": "global", "category": "per_category", "model": "per_model", "model_category": "per_model_category"}
        for group, name in names.items():
            chosen = [self.choices.grouping[group, part.few] for part in asked]
            yield Forecasts(name, "baseline", str(chosen[0]), [
                grouped(self.lengths, known, part.rows, c) for part, c in zip(asked, chosen, strict=True)
            ])  # fmt: skip
        for by_model in (False, True):
            kept = [self.choices.histogram[f"{by_model}", part.few] for part in asked]
            yield Forecasts(
                "histogram_by_model" if by_model else "histogram", "baseline", str(kept[0]),
                [histogram(self.lengths, known, p.rows, c, self.seed) for p, c in zip(asked, kept, strict=True)],
            )  # fmt: skip

    def _ablation(self, asked: Sequence[Asked]) -> Forecasts:
        """LightGBM in the place of our network: it reads our encoder and memory, so it is no baseline."""
        train, held = table_design(self.data, "train"), table_design(self.data, "validation")
        drawn = np.random.default_rng(self.seed).random(len(train.target)) < _STRANGERS_KEPT
        kept = (train.weight >= 1.0) | drawn
        weight = np.where(train.weight[kept] >= 1.0, 1.0, train.weight[kept] / _STRANGERS_KEPT)
        train = replace(
            train, x=train.x[kept], target=train.target[kept], anchor=train.anchor[kept], weight=weight
        )  # fmt: skip
        designs = [
            features_design(part.features, part.anchor, np.zeros(len(part.rows)), np.ones(len(part.rows)))
            for part in asked
        ]
        settings = replace(self.choices.learner["lightgbm"], identity=False, over_anchor=True)
        quantiles = forecast("lightgbm", train, held, designs, settings, self.seed)
        return Forecasts("lightgbm_on_our_memory", "ablation", said(settings), quantiles)

    def _oracle(self, known: Rows, held: Rows, asked: Sequence[Asked]) -> Forecasts:
        """What could be known if every other model's answer to the prompt were: what no forecaster can read."""
        ground = self._ground("svd", known)
        read = with_other_answers(ground, self.lengths.model_split != "test")
        designs = [read(ground.asked(part.rows)) for part in asked]
        settings = replace(self.choices.learner["lightgbm"], over_anchor=True)
        quantiles = forecast(
            "lightgbm", read(ground.train()), read(ground.asked(held)), designs, settings, self.seed
        )  # fmt: skip
        return Forecasts("oracle_other_answers", "bound", "leave-one-out mean and spread of the prompt", quantiles)

"""Follow the leader: the head's quantiles, or those of what such calls came to, whichever did better lately."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarmx.neural.head import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderSettings:
    """What is remembered; chosen on the tuning split of `eval.splits` and on the drifts of validation prompts.

    A class keeps its last `window` outcomes and makes their quantiles anew every `refresh`, from `enough` on. Losses
    are halved every `half_life` outcomes. The head leads until `trial` forecasts of the past were judged. At most
    `most_classes` classes are kept.
    """

    window: int = 400
    enough: int = 8
    refresh: int = 8
    half_life: float = 50.0
    trial: int = 16
    most_classes: int = 2000


class FollowTheLeader:
    """For each class, quantiles [K] in tokens from who had the least loss of late: the head, or the latest outcomes.

    The loss is the pinball loss of the logarithm, of forecasts that were made before their outcome was learnt
    (prequential: Dawid, JRSS A 147, 1984), discounted (follow the leader of two experts: Cesa-Bianchi and Lugosi,
    Prediction, Learning, and Games, 2006). So a class in which prompts tell nothing of lengths is forecast by its past,
    and one in which they do, by the head. One of the two, and not their average: averages of two calibrated forecasts
    are not calibrated. Everything is deterministic.
    """

    def __init__(self, levels: Sequence[float], settings: LeaderSettings | None = None) -> None:
        self.settings = settings or LeaderSettings()
        self._levels = np.array(levels)
        self._keep = 0.5 ** (1.0 / self.settings.half_life)
        self._classes: OrderedDict[str, _Class] = OrderedDict()

    @property
    def classes(self) -> int:
        """How many classes are remembered."""
        return len(self._classes)

    def leads(self, prompt_class: str) -> bool:
        """Whether the head is followed in this class now."""
        known = self._classes.get(prompt_class)
        return known is None or known.head_leads

    def choose(self, prompt_class: str, quantiles: Floats) -> Floats:
        """`quantiles` [K] of the head, or those of the past in their place."""
        known = self._classes.get(prompt_class)
        if known is None or known.past is None or known.head_leads:
            return quantiles
        return known.past

    def observe(self, prompt_class: str, quantiles: Floats, tokens: float) -> None:
        """Learn what came of a call of which the head had said `quantiles` [K], in tokens."""
        known = self._classes.get(prompt_class)
        if known is None:
            known = self._classes[prompt_class] = _Class()
            while len(self._classes) > self.settings.most_classes:
                self._classes.popitem(last=False)
        self._classes.move_to_end(prompt_class)
        if known.past is not None:
            error = np.log1p(tokens) - np.log1p((quantiles, known.past))  # [2, levels]
            loss = np.maximum(self._levels * error, (self._levels - 1.0) * error).sum(axis=1)
            known.behind = self._keep * known.behind + loss.item(0) - loss.item(1)
            known.judged += 1
            known.head_leads = known.judged < self.settings.trial or known.behind <= 0.0
        known.add(tokens, self.settings, self._levels)

    def forget_losses(self) -> None:
        """Let the head lead until it was judged again: it has other weights now."""
        for known in self._classes.values():
            known.behind, known.judged, known.head_leads = 0.0, 0, True


class _Class:
    """Outcomes of one class, their quantiles, and by how much the head is behind them."""

    __slots__ = ("_latest", "_ordered", "_since", "behind", "head_leads", "judged", "past")

    def __init__(self) -> None:
        self.past: Floats | None = None
        self.behind = 0.0  # discounted loss of the head less that of the past
        self.judged = 0
        self.head_leads = True
        self._latest: deque[float] = deque()
        self._ordered: list[float] = []
        self._since = 0

    def add(self, tokens: float, settings: LeaderSettings, levels: Floats) -> None:
        self._latest.append(tokens)
        insort(self._ordered, tokens)
        if len(self._latest) > settings.window:
            del self._ordered[bisect_left(self._ordered, self._latest.popleft())]
        self._since += 1
        if self._since >= (settings.refresh if self.past is not None else settings.enough):
            self._since = 0
            places = np.arange(len(self._ordered)) / (len(self._ordered) - 1)
            self.past = np.interp(levels, places, self._ordered)

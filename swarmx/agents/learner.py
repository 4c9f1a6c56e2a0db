"""The learner agent: sees that forecasts drift, has the head trained again, and takes back what made it worse."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, assert_never

import msgspec

from swarmx.core.actions import Retrain, StartTimer, StopTimer, UsePredictor
from swarmx.core.messages import (
    AlertRaised,
    BoundsChanged,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    DemandReported,
    DrainNoticed,
    FirstToken,
    ForecastRefined,
    ForecastScored,
    Message,
    PolicyChanged,
    PredictorReady,
    ReplicaChanged,
    RetrainEnded,
    ScalePlanned,
    ScaleRequested,
    ScalingPolicyChanged,
    ServiceCurvePublished,
    SignalReported,
    TimerFired,
    TokensProgressed,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.ports import Output

LearnerMode = Literal["off", "paper", "ours"]
Key = tuple[str, str]  # prompt class, device

_LEVEL = 0.9  # of `ForecastScored.covered`
_PATIENCE, _COOL = "patience:", "cool:"
_PROBATION = 4  # times `watch` outcomes, if they are of classes and devices of which nothing was known before
_MOST_DOUBLINGS = 3

_LEAST_BEST = 0.02  # a class whose answers always reach their limit has no loss at all, and every later one is no drift


class LearnerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When forecasts count as drifted, and how often something is done about it. Losses as in `ForecastScored`.

    `window` outcomes of a (prompt class, device) are kept. "paper" retrains when their mean loss is above `threshold`.
    "ours" does when it is, less two standard errors, `tolerance` times what it was in the version's best window, or
    when the number of outcomes at or below the 90 % quantile is more than `band` standard deviations from what it
    should be; and it rolls back when after `watch` outcomes the new version is worse than the old one by two standard
    errors. After a retraining `cooldown_s` pass before the next of the head, twice as long after every one that did
    not help, up to eight times. One whose end is not heard of for `patience_s` counts as failed. Heads that are not
    among `trainable` (None: all are) are watched, and nothing is done about their drift but to tell.
    """

    mode: LearnerMode = "ours"
    window: int = 100
    threshold: float = 0.25
    tolerance: float = 1.5
    band: float = 4.0
    watch: int = 200
    cooldown_s: float = 300.0
    patience_s: float = 900.0
    most_keys: int = 1000
    most_heads: int = 32
    trainable: tuple[str, ...] | None = None


@dataclass(slots=True)
class _Window:
    """The last outcomes of one (prompt class, device) under the version in force."""

    losses: deque[float]
    covered: deque[bool]
    fresh: int = 0  # outcomes since the last look
    best: float = math.inf  # lowest mean loss of a full window
    before: float | None = None  # mean loss under the version before this one

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def standard_error(self) -> float:
        """Of the mean: losses have heavy tails, and chance must not look like drift."""
        mean, count = self.mean, len(self.losses)
        return math.sqrt(sum((loss - mean) ** 2 for loss in self.losses)) / count


@dataclass(slots=True)
class _Watch:
    """A new version on probation: losses against the means of the version before, key by key."""

    previous: str
    seen: int = 0  # outcomes since the swap, whether there is something to compare them with or not
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, difference: float) -> None:
        self.count += 1
        self.total += difference
        self.squares += difference * difference

    @property
    def is_worse(self) -> bool:
        mean = self.total / self.count
        variance = max(0.0, self.squares / self.count - mean * mean)
        return mean > 2.0 * math.sqrt(variance / self.count)


@dataclass(slots=True)
class _Head:
    """What the learner remembers of one head."""

    version: str
    strangers: int = 0  # outcomes of other versions in a row
    windows: OrderedDict[Key, _Window] = field(default_factory=OrderedDict)
    retrain_id: str = ""  # of the retraining that runs
    awaited: str = ""  # the version that was asked for and is not in force yet
    is_cooling: bool = False
    is_drifting: bool = False  # an episode that was told
    failures: int = 0
    watch: _Watch | None = None


class LearnerAgent:
    """The four parts: losses of forecasts come with the messages, windows of them are its memory, `actions` are its
    tools, and its objective is a low tail loss: the SwarmX paper's Algorithm 2 (arXiv 2606.21401) in the mode "paper".

    A window is looked at each time that half of it is new. One retraining a head at a time; late, doubled and unknown
    answers change nothing. Its memory is bounded: what was silent for longest is forgotten.
    """

    name = "learner"
    listens: frozenset[type] = frozenset({ForecastScored, RetrainEnded, PredictorReady, TimerFired})
    actions: frozenset[type] = frozenset({Retrain, UsePredictor, StartTimer, StopTimer})

    def __init__(self, settings: LearnerSettings) -> None:
        self.settings = settings
        self._heads: OrderedDict[str, _Head] = OrderedDict()

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Rebuild the agent that wrote a journal; `config` is `msgspec.to_builtins(settings)`."""
        return cls(msgspec.convert(config, LearnerSettings))

    def handle(self, message: Message, now_s: float) -> Sequence[Output]:
        if self.settings.mode == "off":
            return ()
        match message:
            case ForecastScored():
                return self._scored(message, now_s)
            case RetrainEnded():
                return self._retrained(message, now_s)
            case PredictorReady():
                return self._swapped(message)
            case TimerFired():
                return self._timer(message.key, now_s)
            case (
                CallReady()
                | FirstToken()
                | TokensProgressed()
                | CallFinished()
                | CallFailed()
                | CallCancelled()
                | ReplicaChanged()
                | DrainNoticed()
                | SignalReported()
                | PolicyChanged()
                | WorkflowSubmitted()
                | WorkflowEnded()
                | DemandReported()
                | BoundsChanged()
                | ScaleRequested()
                | ScalingPolicyChanged()
                | ScalePlanned()
                | ForecastRefined()
                | ServiceCurvePublished()
                | DecisionMade()
                | AlertRaised()
            ):
                return ()
            case _:
                assert_never(message)

    def is_drifting(self, head: str) -> bool:
        """Whether an episode of drift is going on that has been told."""
        known = self._heads.get(head)
        return known is not None and known.is_drifting

    def is_retraining(self, head: str) -> bool:
        """Whether a retraining of the head was asked for whose end has not been heard of."""
        known = self._heads.get(head)
        return known is not None and bool(known.retrain_id)

    def _scored(self, message: ForecastScored, now_s: float) -> Sequence[Output]:
        if not (math.isfinite(message.loss) and message.loss >= 0.0):
            return ()
        head = self._head(message.head, message.version)
        if message.version != head.version and not self._is_adopted(head, message.version):
            return ()
        head.strangers = 0
        window = self._window(head, (message.prompt_class, message.device))
        window.losses.append(message.loss)
        window.covered.append(message.covered)
        window.fresh += 1
        outputs = self._watched(message, head, window, now_s)
        half = max(1, self.settings.window // 2)
        if outputs or len(window.losses) < self.settings.window or window.fresh < half:
            return outputs
        window.fresh = 0
        drifts = self._drifts(window)
        window.best = min(window.best, window.mean)
        if not drifts:
            self._end_episode(head)
            return ()
        return self._drifted(message.head, head, (message.prompt_class, message.device), now_s)

    def _is_adopted(self, head: _Head, version: str) -> bool:
        """Outcomes of calls that were forecast before a swap do not count. But when nothing else is seen for half a
        window, that version is in force, whoever put it there: the first outcome may have been a fallback's.
        """
        head.strangers += 1
        if head.strangers < max(1, self.settings.window // 2):
            return False
        self._begin(head, version)
        return True

    def _drifted(self, name: str, head: _Head, key: Key, now_s: float) -> Sequence[Output]:
        outputs: list[Output] = []
        if not head.is_drifting:
            head.is_drifting = True
            outputs.append(AlertRaised(kind="forecast_drift", subject=name, value=head.windows[key].mean))
        if self.settings.trainable is not None and name not in self.settings.trainable:
            return outputs
        if head.retrain_id or head.awaited or head.watch is not None or head.is_cooling:
            return outputs
        head.retrain_id = f"{name}-{round(now_s * 1000)}"
        keys = (key,) if self.settings.mode == "paper" else self._drifting(head)
        if self.settings.mode == "paper":
            head.windows[key].losses.clear()
            head.windows[key].covered.clear()
        outputs += [
            Retrain(retrain_id=head.retrain_id, head=name, keys=keys),
            StartTimer(key=_PATIENCE + name, at_s=now_s + self.settings.patience_s),
        ]
        return outputs

    def _drifts(self, window: _Window) -> bool:
        if len(window.losses) < self.settings.window:
            return False
        if self.settings.mode == "paper":
            return window.mean > self.settings.threshold
        count = len(window.covered)
        spread = math.sqrt(count * _LEVEL * (1.0 - _LEVEL))
        is_off = abs(sum(window.covered) - _LEVEL * count) > self.settings.band * spread
        return is_off or window.mean - 2.0 * window.standard_error > self.settings.tolerance * max(
            window.best, _LEAST_BEST
        )

    def _drifting(self, head: _Head) -> tuple[Key, ...]:
        return tuple(sorted(key for key, window in head.windows.items() if self._drifts(window)))

    def _end_episode(self, head: _Head) -> None:
        if head.is_drifting and not (head.retrain_id or head.awaited) and not self._drifting(head):
            head.is_drifting = False

    def _retrained(self, message: RetrainEnded, now_s: float) -> Sequence[Output]:
        head = self._heads.get(message.head)
        if head is None or not head.retrain_id or message.retrain_id != head.retrain_id:
            return ()
        head.retrain_id = ""
        if message.outcome != "better":
            head.failures += 1
            return [StopTimer(key=_PATIENCE + message.head), *self._cool(message.head, head, now_s)]
        head.awaited = message.version
        return [  # the patience now holds for the swap
            UsePredictor(head=message.head, version=message.version),
            StartTimer(key=_PATIENCE + message.head, at_s=now_s + self.settings.patience_s),
            *self._cool(message.head, head, now_s),
        ]

    def _swapped(self, message: PredictorReady) -> Sequence[Output]:
        """Other weights are in force, by our wish or somebody else's: what was seen of the old ones says little now."""
        head = self._heads.get(message.head)
        if head is None:
            self._head(message.head, message.version)
            return ()
        if message.version == head.version:
            return ()
        was_asked_for = message.version == head.awaited
        is_rollback = head.watch is not None
        on_trial = was_asked_for and not is_rollback and self.settings.mode == "ours"
        self._begin(head, message.version, before=message.previous if on_trial else None)
        if was_asked_for:
            head.awaited = ""
            return (StopTimer(key=_PATIENCE + message.head),)
        return ()

    def _begin(self, head: _Head, version: str, before: str | None = None) -> None:
        """Empty all windows; with the version `before`, keep what it came to, and watch the new one against it."""
        for key, window in list(head.windows.items()):
            head.windows[key] = self._empty(window.mean if before is not None and window.losses else None)
        head.watch = None if before is None else _Watch(before)
        head.version, head.strangers = version, 0

    def _watched(self, message: ForecastScored, head: _Head, window: _Window, now_s: float) -> list[Output]:
        """Roll back when the new version does worse than the old one did; end the probation when it does not."""
        watch = head.watch
        if watch is None or head.awaited:
            return []
        watch.seen += 1
        if window.before is not None:
            watch.add(message.loss - window.before)
        enough = watch.count >= self.settings.watch
        if not enough and watch.seen < _PROBATION * self.settings.watch:
            return []
        if not (enough and watch.is_worse):
            head.watch, head.failures = None, 0
            return []
        head.awaited = watch.previous  # `watch` stays until it is back: a rollback is not watched in turn
        head.failures += 1
        return [
            UsePredictor(head=message.head, version=watch.previous),
            StartTimer(key=_PATIENCE + message.head, at_s=now_s + self.settings.patience_s),
            *self._cool(message.head, head, now_s),
        ]

    def _timer(self, key: str, now_s: float) -> Sequence[Output]:
        prefix, _, name = key.partition(":")
        head = self._heads.get(name)
        if head is None:
            return ()
        if prefix + ":" == _COOL:
            head.is_cooling = False
        elif prefix + ":" == _PATIENCE and (head.retrain_id or head.awaited):
            head.retrain_id, head.awaited, head.watch = "", "", None
            head.failures += 1
            return self._cool(name, head, now_s)
        return ()

    def _cool(self, name: str, head: _Head, now_s: float) -> Sequence[Output]:
        """Wait before the next retraining; the paper's algorithm does not."""
        if self.settings.mode == "paper":
            return ()
        head.is_cooling = True
        cooldown_s = self.settings.cooldown_s * 2 ** min(head.failures, _MOST_DOUBLINGS)
        return (StartTimer(key=_COOL + name, at_s=now_s + cooldown_s),)

    def _head(self, name: str, version: str) -> _Head:
        head = self._heads.get(name)
        if head is None:
            head = self._heads[name] = _Head(version)
            if len(self._heads) > self.settings.most_heads:
                self._heads.popitem(last=False)
        self._heads.move_to_end(name)
        return head

    def _window(self, head: _Head, key: Key) -> _Window:
        window = head.windows.get(key)
        if window is None:
            window = head.windows[key] = self._empty(None)
            if len(head.windows) > self.settings.most_keys:
                head.windows.popitem(last=False)
        head.windows.move_to_end(key)
        return window

    def _empty(self, before: float | None) -> _Window:
        length = self.settings.window
        return _Window(deque(maxlen=length), deque(maxlen=length), before=before)

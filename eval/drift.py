"""How fast forecasts recover from drift: lengths of a class triple, two classes swap ranks, a device slows by 71 %.

Real lengths and latencies of prompts and requests that no head was trained on, in a random order that the seed gives,
change at one moment. Calls of what drifts end at 4 a second, as many others beside them: 200 observations take 50 s.
Arms: the frozen head; the paper's Algorithm 2 (retraining on the window of the key, for that key, when its mean tail
loss is above 1.5 times the highest of a class in training: of 1.25, 1.5 and 2 the best on validation prompts, seen over
all drifts); tracking; tracking and following the leader of head and past, as a server forecasts lengths; the same with
retraining. The second and the last run the real learner agent in virtual time, and a retraining takes as long as it
took here plus two seconds.

Rolling coverage is that of the last 200 observations, and none before the drift, of each key that drifted, pooled over
the seeds; recovered is when it is within three points of 90 % and stays there. A class with fewer rows than a stream
needs is drawn from with replacement: that they recur flatters retraining, not tracking.

    python -m eval.drift --data DIR --out DIR [--seeds 10] [--split test] [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from eval.drift_grounds import Ground, latency_ground, length_ground
from eval.result import Claim, Row, claim, table, write_result
from eval.splits import Split
from swarmx.agents.learner import LearnerAgent, LearnerSettings
from swarmx.core.actions import Action, Retrain, UsePredictor
from swarmx.core.messages import ForecastScored, Message, PredictorReady, RetrainEnded
from swarmx.neural.head import Floats, Head
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.losses import pinball
from swarmx.neural.refit import weighted_loss
from swarmx.neural.table import Table
from swarmx.neural.tracking import Key, QuantileTracker
from swarmx.neural.training.retrain import Job, held_back, retrain
from swarmx.runtime.journal import MemoryJournal
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell

Arm = Literal["frozen", "paper", "tracking", "tracking+leader", "tracking+leader+retrain"]

RATE = 4.0
WINDOW = 200
LEVEL = 0.9
POINTS = 0.03
AIM_S = 60.0
SLOWER = 1.0 / (1.0 - 0.71)
_BEFORE_S, _AFTER_S = 120.0, 300.0
_START_S = 2.0  # of a training process, with writing the records
_MEMORY = 1500
_REPLAYED = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What changes: the logarithm of outcomes (plus softening) of these keys, each by its function."""

    name: str
    ground: Ground
    changes: Mapping[Key, Callable[[Floats], Floats]]
    others: Sequence[Key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Calls in the order of their ends: when [n], of which key [n], which row of the ground [n], what came [n]."""

    at_s: Floats
    key: Sequence[Key]
    row: NDArray[np.intp]
    log_y: Floats


def drifts(prompts: Path, engine: Path, split: Split) -> list[Drift]:
    """The three, on their grounds."""
    lengths, latencies = length_ground(prompts, split), latency_ground(engine, split)
    classes = [("gsm", ""), ("crux", ""), ("arena-bench-v1", ""), ("numersense-v2", "")]

    def others(*drifting: Key) -> list[Key]:
        return [key for key in classes if key not in drifting]

    def tripled(log_y: Floats) -> Floats:
        longer: Floats = log_y + np.log(3.0)
        return longer

    def becomes(one: str, other: str) -> Callable[[Floats], Floats]:
        """Lengths of the one class get the median and the spread, in the logarithm, of the other's."""
        train = lengths.train
        log_y = {name: np.log(train.target[train.group == name] + 1.0) for name in (one, other)}
        ratio = float(np.std(log_y[other]) / np.std(log_y[one]))
        return lambda y: np.median(log_y[other]) + ratio * (y - np.median(log_y[one]))

    long, short = "arena-bench-v1", "numersense-v2"
    swap = {(long, ""): becomes(long, short), (short, ""): becomes(short, long)}
    slow: dict[Key, Callable[[Floats], Floats]] = {("all", "slowed"): lambda y: y + np.log(SLOWER)}
    return [
        *(
            Drift(name=f"triple-{name}", ground=lengths, changes={(name, ""): tripled}, others=others((name, "")))
            for name in ("gsm", long)
        ),
        Drift(name="swap", ground=lengths, changes=swap, others=others(*swap)),
        Drift(name="slow-device", ground=latencies, changes=slow, others=[("all", "steady")]),
    ]


def stream(drift: Drift, seed: int) -> Stream:
    """Every key that drifts has `RATE` ends a second, the others together as many; the drift is at time zero."""
    rng = np.random.default_rng(seed)
    rows, softening = drift.ground.rows, drift.ground.head.spec.softening
    rates = dict.fromkeys(drift.changes, RATE) | {key: RATE / len(drift.others) for key in drift.others}
    total = sum(rates.values())
    count = rng.poisson(total * (_BEFORE_S + _AFTER_S))
    at_s = np.sort(rng.uniform(-_BEFORE_S, _AFTER_S, count))
    keys = list(rates)
    which = rng.choice(len(keys), size=count, p=np.array(list(rates.values())) / total)
    row = np.empty(count, dtype=np.intp)
    log_y = np.empty(count)
    for i, key in enumerate(keys):
        mine = which == i
        there = np.flatnonzero(rows.group == key[0])
        row[mine] = rng.choice(there, size=mine.sum(), replace=mine.sum() > len(there))
        log_y[mine] = np.log(rows.target[row[mine]] + softening)
        if key in drift.changes:
            late = mine & (at_s >= 0.0)
            log_y[late] = drift.changes[key](log_y[late])
    return Stream(at_s=at_s, key=[keys[i] for i in which], row=row, log_y=np.maximum(log_y, np.log(softening)))


class Predictor:
    """One arm in virtual time: forecasts each call, is told what came, and retrains as its learner says."""

    def __init__(self, arm: Arm, drift: Drift, calls: Stream, threshold: float) -> None:
        self.arm, self.calls, self.ground = arm, calls, drift.ground
        self.head = drift.ground.head
        self.of_key: dict[Key, Head] = {}  # the paper trains one per key
        self.tracker = QuantileTracker(self.head.spec.levels) if arm.startswith("tracking") else None
        self.leader = FollowTheLeader(self.head.spec.levels) if "leader" in arm else None
        self.trained: dict[str, tuple[Key | None, Head]] = {"v0": (None, self.head)}
        self.version, self.swaps = "v0", 0
        self.ended = 0  # calls
        self._said = self._all_rows(self.head)
        self._said_of_key: dict[Key, Floats] = {}
        mode: Literal["off", "paper", "ours"] = "off"
        if arm in ("paper", "tracking+leader+retrain"):
            mode = "paper" if arm == "paper" else "ours"
        settings = LearnerSettings(mode=mode, threshold=threshold)
        self.window = settings.window
        journal = MemoryJournal(limit=1)
        self.shell = VirtualShell(
            Switchboard([LearnerAgent(settings)], epoch=1, journal=journal), self, start_s=-_BEFORE_S
        )

    def run(self) -> Iterator[tuple[Floats, float]]:
        """The log quantiles [K] that were in force for each call, and what came."""
        k = self.head.spec.levels.index(LEVEL)
        for i, (at_s, key) in enumerate(zip(self.calls.at_s.tolist(), self.calls.key, strict=True)):
            self.shell.run(until_s=at_s)
            raw = self._said_of_key.get(key, self._said)[self.calls.row[i]]
            q = corrected = self.tracker.correct(*key, raw) if self.tracker is not None else raw
            log_y = float(self.calls.log_y[i])
            if self.leader is not None:
                tokens = self._tokens(corrected)
                q = np.log(self.leader.choose("|".join(key), tokens) + self.head.spec.softening)
                self.leader.observe("|".join(key), tokens, float(self._tokens(log_y)))
            yield q, log_y
            if self.tracker is not None:
                self.tracker.observe(*key, raw, log_y)
            over = log_y - float(raw[k])  # tracking must not hide from the learner that the head itself is off
            self.ended = i + 1
            self.shell.post(
                ForecastScored(
                    head="h",
                    version=self.version,
                    prompt_class=key[0],
                    device=key[1],
                    loss=max(LEVEL * over, (LEVEL - 1.0) * over),
                    covered=over <= 0.0,
                ),
                at_s=at_s,
            )

    def perform(self, action: Action, now_s: float) -> Iterator[tuple[float, Message]]:
        """The trainer and the swap, as the learner asks for them."""
        match action:
            case Retrain():
                yield self._retrain(action)
            case UsePredictor():
                previous, self.version = self.version, action.version
                self._swap(action.version)
                yield 0.0, PredictorReady(head="h", version=action.version, previous=previous)

    def _retrain(self, action: Retrain) -> tuple[float, Message]:
        began_s = time.perf_counter()
        key = action.keys[0] if self.arm == "paper" else None
        which = np.arange(max(0, self.ended - _MEMORY), self.ended)
        if key is not None:
            which = np.array([i for i in range(self.ended) if self.calls.key[i] == key][-self.window :])
        job = Job(spec=self.head.spec, half_life=1e9 if key else Job(spec=self.head.spec).half_life)
        old = self.of_key.get(key, self.head) if key else self.head
        rows = held_back(self._table(which), job.half_life)
        new = retrain(old, rows, job)
        checked = rows.part("validation")
        before, after = weighted_loss(old, checked), weighted_loss(new, checked)
        is_better = after < before * (1.0 - job.gain)
        version = f"v{len(self.trained)}"
        self.trained[version] = (key, new)
        message = RetrainEnded(
            retrain_id=action.retrain_id,
            head="h",
            outcome="better" if is_better else "worse",
            version=version if is_better else "",
            loss_before=before,
            loss_after=after,
        )
        return _START_S + time.perf_counter() - began_s, message

    def _swap(self, version: str) -> None:
        self.swaps += 1
        key, head = self.trained[version]
        if key is not None:
            self.of_key[key], self._said_of_key[key] = head, self._all_rows(head)
            return
        self.head, self._said = head, self._all_rows(head)
        if self.leader is not None:
            self.leader.forget_losses()
        if self.tracker is not None:  # it starts again with what the new head would have said of the latest calls
            self.tracker.reset()
            for i in range(max(0, self.ended - _REPLAYED), self.ended):
                self.tracker.observe(*self.calls.key[i], self._said[self.calls.row[i]], float(self.calls.log_y[i]))

    def _tokens(self, log_y: Floats | float) -> Floats:
        tokens: Floats = np.maximum(0.0, np.exp(log_y) - self.head.spec.softening)
        return tokens

    def _all_rows(self, head: Head) -> Floats:
        rows = self.ground.rows
        return head.log_quantiles(rows.features, rows.anchor, list(rows.group))

    def _table(self, which: NDArray[np.intp]) -> Table:
        rows = self.ground.rows
        row = self.calls.row[which]
        return replace(
            Table(**{name: getattr(rows, name)[row] for name in Table.__slots__}),
            target=np.exp(self.calls.log_y[which]) - self.head.spec.softening,
        )


def highest_loss(ground: Ground) -> float:
    """The highest mean tail loss of a class without drift, on rows that the head was trained on."""
    rows, head = ground.train, ground.head
    q = head.log_quantiles(rows.features, rows.anchor, list(rows.group))
    over = np.log(rows.target + head.spec.softening) - q[:, head.spec.levels.index(LEVEL)]
    loss = np.maximum(LEVEL * over, (LEVEL - 1.0) * over)
    return max(float(loss[rows.group == name].mean()) for name in np.unique(rows.group))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One arm, one drift, one seed: the calls of the keys that drifted, in order; all shapes [n]."""

    at_s: Floats
    covered: Floats
    loss: Floats
    swaps: int


def run_one(arm: Arm, drift: Drift, seed: int, threshold: float) -> Seen:
    """Losses are means over the levels of the pinball loss of the logarithm."""
    calls = stream(drift, seed)
    predictor = Predictor(arm, drift, calls, threshold)
    said = list(predictor.run())
    q, log_y = np.stack([q for q, _ in said]), np.array([y for _, y in said])
    drifted = np.array([key in drift.changes for key in calls.key])
    levels = drift.ground.head.spec.levels
    return Seen(
        at_s=calls.at_s[drifted],
        covered=(log_y <= q[:, levels.index(LEVEL)])[drifted].astype(np.float64),
        loss=pinball(log_y, q, levels).mean(axis=1)[drifted],
        swaps=predictor.swaps,
    )


def recovery_s(runs: Sequence[Seen], window: int) -> float:
    """Seconds after the drift until rolling coverage is within `POINTS` and stays; infinite when it never does."""
    grid = np.arange(0.5, _AFTER_S, 0.5)
    pooled = np.zeros((len(grid), 2))  # covered, all
    for run in runs:
        sums = np.concatenate([[0.0], np.cumsum(run.covered)])
        ends = np.searchsorted(run.at_s, grid, side="right")
        begins = np.maximum(ends - window, np.searchsorted(run.at_s, 0.0))
        pooled += np.column_stack([sums[ends] - sums[begins], ends - begins])
    rolling = pooled[:, 0] / np.maximum(1.0, pooled[:, 1])
    off = np.flatnonzero(np.abs(rolling - LEVEL) > POINTS)
    if len(off) == 0:
        return 0.0
    return float("inf") if off[-1] == len(grid) - 1 else float(grid[off[-1] + 1])


def summary(drift: Drift, arm: Arm, runs: Sequence[Seen]) -> dict[str, str | float]:
    """One row: pooled over the seeds."""
    per_key = WINDOW * len(drift.changes)

    def mean(field: Literal["covered", "loss"], begin: int, end: int | None) -> float:
        """Over the begin-th to end-th observations after the drift, of every seed."""
        parts = [getattr(run, field)[run.at_s >= 0.0][begin:end] for run in runs]
        return float(np.concatenate(parts).mean())

    before = np.concatenate([run.loss[(run.at_s < 0.0) & (run.at_s > -_BEFORE_S / 2.0)] for run in runs])
    return {
        "experiment": "drift",
        "drift": drift.name,
        "arm": arm,
        "seeds": len(runs),
        "recovery_s": recovery_s(runs, per_key),
        "recovery_short_window_s": recovery_s(runs, per_key // 4),
        "coverage_first_20": mean("covered", 0, per_key // 10),
        "coverage_21_to_60": mean("covered", per_key // 10, per_key * 3 // 10),
        "coverage_first_200": mean("covered", 0, per_key),
        "coverage_201_to_400": mean("covered", per_key, 2 * per_key),
        "coverage_after_400": mean("covered", 2 * per_key, None),
        "loss_before": float(before.mean()),
        "loss_after": mean("loss", 0, None),
        "loss_after_200": mean("loss", per_key, None),
        "swaps": float(np.mean([run.swaps for run in runs])),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.drift", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a folder with prompts/ and engine/")
    parser.add_argument("--prompts", type=Path, help="another folder of prompts")
    parser.add_argument("--engine", type=Path, help="another folder of engine tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--split", choices=get_args(Split)[1:], default="test", help="choose settings on validation")
    parser.add_argument("--quick", action="store_true", help="two seeds: does it run?")
    wanted = parser.parse_args(arguments)
    console = Console(stderr=True)
    prompts, engine = wanted.prompts or wanted.data / "prompts", wanted.engine or wanted.data / "engine"
    seeds = range(2 if wanted.quick else wanted.seeds)
    rows: list[Row] = []
    claims: list[Claim] = []
    for drift in drifts(prompts, engine, wanted.split):
        threshold = 1.5 * highest_loss(drift.ground)
        for arm in get_args(Arm):
            runs = [run_one(arm, drift, seed, threshold) for seed in seeds]
            row = summary(drift, arm, runs)
            rows.append(row)
            console.print(f"{drift.name} {arm}: recovery {row['recovery_s']} s, loss {row['loss_after']:.4f}")
            if arm.startswith("tracking"):
                at = f"{drift.name},{arm}"
                error = abs(float(row["coverage_201_to_400"]) - LEVEL)
                claims += [
                    claim(f"recovery_s@{at}", float(row["recovery_s"]), "<=", AIM_S),
                    claim(f"coverage_error_points@{at}", 100.0 * error, "<=", 100.0 * POINTS),
                ]
    files = [prompts / "prompts.parquet", prompts / "lengths.parquet", engine / "measured_requests_vllm_state.parquet"]
    command = f"python -m eval.drift --data DIR --seeds {len(seeds)} --split {wanted.split}"
    path = write_result(wanted.out, command, rows, claims, list(seeds), files)
    console.print(table(rows))
    console.print(f"Written: {path}")


if __name__ == "__main__":
    main()

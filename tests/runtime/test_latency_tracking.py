"""Service curves follow what calls take."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from swarmx.core.forecast import LEVELS
from swarmx.core.messages import (
    CallCancelled,
    CallFinished,
    ForecastScored,
    Message,
    ReplicaChanged,
    ServiceCurvePublished,
)
from swarmx.core.nouns import Replica
from swarmx.neural.curves import UNCACHED, read_curve
from swarmx.neural.curves import WORK as WORKS
from swarmx.neural.tracking import QuantileTracker
from swarmx.runtime.latency_tracking import LatencyTracking
from tests.agents.worlds import a_replica
from tests.runtime.decisions import decided

FAST, SLOWED = a_replica("a"), 1.0 / 0.29
WORK, PROMPT = 256.0, 1024


def a_curve(replica: Replica) -> ServiceCurvePublished:
    """A constant and a line in each argument, give or take 30 %."""
    normal = NormalDist()
    around = [math.exp(0.3 * normal.inv_cdf(level)) for level in LEVELS]
    seconds = [[0.05 + 0.002 * work + 1e-5 * uncached for uncached in UNCACHED] for work in WORKS]
    return ServiceCurvePublished(
        replica_id=replica.replica_id,
        work=WORKS,
        uncached=UNCACHED,
        levels=LEVELS,
        completion_s=tuple(s * factor for row in seconds for s in row for factor in around),
        ttft_s=tuple(0.05 * factor for _ in UNCACHED for factor in around),
        measured_at_s=0.0,
        version="curve-1",
    )


class Scene:
    def __init__(self, **settings: float) -> None:
        self.posted: list[Message] = []
        self.tracking = LatencyTracking(QuantileTracker(LEVELS), post=self.posted.append, **settings)  # type: ignore[arg-type]
        self.now_s = 0.0

    def call(self, name: str, seconds: float, *, gap_s: float = 1.0) -> None:
        self.now_s += gap_s
        self.tracking.observe(decided(name, replica_id="a"), self.now_s)
        finished = CallFinished(call_id=name, attempt=1, prompt_tokens=PROMPT, cached_tokens=0, work_done=WORK)
        self.tracking.observe(finished, self.now_s + seconds)


def test_after_a_device_has_become_slower_its_curves_say_so() -> None:
    scene, raw = Scene(), a_curve(FAST)
    usual = read_curve(raw, WORK, PROMPT)[0]
    scene.tracking.corrected(FAST, raw)
    rng = np.random.default_rng(0)
    for i in range(200):
        scene.call(f"c{i}", SLOWED * float(usual[LEVELS.index(0.5)] * math.exp(0.3 * rng.normal())), gap_s=100.0)
    now = read_curve(scene.tracking.corrected(FAST, raw), WORK, PROMPT)[0]
    assert now[LEVELS.index(0.5)] == pytest.approx(SLOWED * usual[LEVELS.index(0.5)], rel=0.15)
    assert (np.diff(now) >= 0.0).all()
    scores = [message for message in scene.posted if isinstance(message, ForecastScored)]
    assert {(s.head, s.prompt_class, s.device) for s in scores} == {("completion", FAST.model, FAST.device)}
    covered = [score.covered for score in scores]
    assert not covered[0]
    assert sum(covered[-100:]) == pytest.approx(90, abs=8)


def test_another_replica_on_the_same_device_profits() -> None:
    scene, raw = Scene(), a_curve(FAST)
    scene.tracking.corrected(FAST, raw)
    for i in range(60):
        scene.call(f"c{i}", SLOWED * 3.0, gap_s=100.0)
    other = a_replica("b")
    before, after = raw.completion_s, scene.tracking.corrected(other, raw).completion_s
    assert after != before


def test_calls_that_do_not_end_well_teach_nothing_and_are_forgotten() -> None:
    scene = Scene()
    scene.tracking.corrected(FAST, a_curve(FAST))
    scene.tracking.observe(decided("c", replica_id="a"), 1.0)
    scene.tracking.observe(CallCancelled(call_id="c"), 2.0)
    finished = CallFinished(call_id="c", attempt=1, prompt_tokens=1, cached_tokens=0, work_done=1.0)
    scene.tracking.observe(finished, 3.0)
    assert scene.posted == []


def test_only_so_many_outcomes_a_second_are_looked_at() -> None:
    scene = Scene(most_per_s=2.0)
    scene.tracking.corrected(FAST, a_curve(FAST))
    for i in range(100):
        scene.call(f"c{i}", 0.0, gap_s=0.01)
    assert len(scene.posted) <= 3


def test_a_replica_that_is_gone_is_forgotten() -> None:
    scene = Scene()
    scene.tracking.corrected(FAST, a_curve(FAST))
    scene.tracking.observe(ReplicaChanged(replica=FAST, state="gone"), 1.0)
    scene.call("c", 1.0)
    assert scene.posted == []

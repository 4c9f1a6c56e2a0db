"""The head's quantiles, or those of what such calls came to, whichever did better lately."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.forecast import LEVELS
from swarmx.neural.head import Floats
from swarmx.neural.leader import FollowTheLeader, LeaderSettings
from swarmx.neural.losses import pinball

FLAT = np.full(len(LEVELS), 100.0)


def a_head(middle: float, spread: float = 0.5) -> Floats:
    """Lognormal quantiles, [levels], in tokens."""
    normal = np.array([-1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645, 2.326])
    return np.asarray(middle * np.exp(spread * normal))


def loss(leader: FollowTheLeader | None, said: list[Floats], tokens: list[float]) -> float:
    """Mean pinball loss of the logarithm, each forecast made before its outcome is learnt."""
    total = 0.0
    for q, y in zip(said, tokens, strict=True):
        served = q if leader is None else leader.choose("c", q)
        total += float(pinball(np.array([np.log1p(y)]), np.log1p(served)[None, :], LEVELS).mean())
        if leader is not None:
            leader.observe("c", q, y)
    return total / len(said)


def test_a_class_that_was_never_seen_is_what_the_head_says() -> None:
    leader = FollowTheLeader(LEVELS)
    assert leader.leads("c")
    assert leader.choose("c", FLAT) is FLAT


def test_a_head_that_knows_nothing_gives_way_to_the_past() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.lognormal(4.0, 0.5, 400).tolist()
    said = [a_head(float(m)) for m in rng.lognormal(4.0, 1.0, 400)]  # as spread as can be, and by chance
    leader = FollowTheLeader(LEVELS)
    assert loss(leader, said, tokens) < 0.8 * loss(None, said, tokens)
    assert not leader.leads("c")
    assert leader.choose("c", FLAT) == pytest.approx(np.quantile(tokens, LEVELS), rel=0.02)


def test_a_head_that_knows_is_followed() -> None:
    rng = np.random.default_rng(4)
    middles = rng.lognormal(4.0, 1.0, 400)
    tokens = (middles * rng.lognormal(0.0, 0.2, 400)).tolist()
    said = [a_head(float(m), 0.2) for m in middles]
    leader = FollowTheLeader(LEVELS)
    assert loss(leader, said, tokens) == loss(None, said, tokens)
    assert leader.leads("c")


def test_after_a_change_a_head_that_follows_it_leads_again() -> None:
    rng = np.random.default_rng(5)
    leader = FollowTheLeader(LEVELS)
    for tokens in rng.lognormal(4.0, 0.5, 400).tolist():
        leader.observe("c", a_head(float(rng.lognormal(4.0, 1.0))), tokens)
    assert not leader.leads("c")
    for tokens in rng.lognormal(4.0 + np.log(3.0), 0.5, 60).tolist():  # three times as long; the head says so
        leader.observe("c", a_head(float(np.exp(4.0) * 3.0)), tokens)
    assert leader.leads("c")


def test_other_weights_lead_until_they_were_judged_and_the_past_stays() -> None:
    leader = FollowTheLeader(LEVELS)
    for _ in range(100):
        leader.observe("c", a_head(1000.0), 10.0)
    assert not leader.leads("c")
    leader.forget_losses()
    assert leader.choose("c", FLAT) is FLAT
    for _ in range(LeaderSettings().trial):
        leader.observe("c", a_head(1000.0), 10.0)
    assert leader.choose("c", FLAT) == pytest.approx(10.0)


def test_classes_do_not_teach_each_other() -> None:
    leader = FollowTheLeader(LEVELS)
    for _ in range(100):
        leader.observe("c", a_head(1000.0), 10.0)
    assert leader.choose("d", FLAT) is FLAT


def test_what_was_silent_for_longest_is_forgotten() -> None:
    leader = FollowTheLeader(LEVELS, LeaderSettings(most_classes=2))
    for name in ("a", "b", "a", "c"):
        for _ in range(30):
            leader.observe(name, a_head(1000.0), 10.0)
    assert leader.classes == 2
    assert leader.leads("b")
    assert not leader.leads("a")


@given(
    st.lists(st.tuples(st.floats(0.0, 1e7), st.floats(0.1, 1e6), st.floats(0.0, 3.0)), min_size=1, max_size=80),
    st.floats(0.1, 1e6),
)
def test_whatever_is_heard_it_is_the_head_or_within_the_latest_outcomes(
    heard: list[tuple[float, float, float]], middle: float
) -> None:
    leader = FollowTheLeader(LEVELS, LeaderSettings(trial=2, window=16, refresh=1))
    for tokens, said, spread in heard:
        leader.observe("c", a_head(said, spread), tokens)
    q = a_head(middle)
    chosen = leader.choose("c", q)
    latest = [tokens for tokens, _, _ in heard[-16:]]
    assert (np.diff(chosen) >= 0.0).all()
    assert chosen is q or (chosen.min() >= min(latest) and chosen.max() <= max(latest))
    assert (chosen is q) == leader.leads("c")

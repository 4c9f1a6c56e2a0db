"""A machine that is to go says so before: a stand-in starts at once, and the replica goes in time."""

from __future__ import annotations

from swarmx.core.actions import Drain
from swarmx.core.messages import DrainNoticed
from tests.agents.scaling_worlds import a_bench, a_group, deployed, drained, of_group


def noticed(replica_id: str, at_s: float | None) -> DrainNoticed:
    return DrainNoticed(replica_id=replica_id, deadline_at_s=at_s)


def test_a_notice_starts_a_stand_in_at_once_and_the_replica_goes_when_that_is_up() -> None:
    bench = a_bench(a_group(limit=2), drain_s=10.0, up_cooldown_s=1000.0)
    bench.tick(16)
    bench.become("ready", "g-0", "g-1")
    assert deployed(bench.say(noticed("g-0", 300.0))) == ["g-2"]  # beyond the limit: one of three is to go
    assert bench.tick(16) == []
    bench.become("ready", "g-2")
    [drain] = bench.tick(16)
    assert (drain.replica_id, drain.deadline_at_s) == ("g-0", bench.now_s + 10.0)
    assert bench.become("gone", "g-0") == []
    assert bench.tick(16) == []


def test_a_replica_whose_time_is_short_goes_at_once_and_is_gone_by_its_deadline() -> None:
    bench = a_bench(drain_s=10.0)
    bench.tick(16)
    bench.become("ready", "g-0", "g-1")
    said = bench.say(noticed("g-0", bench.now_s + 7.0))
    assert deployed(said) == ["g-2"]
    assert [(d.replica_id, d.deadline_at_s) for d in said if isinstance(d, Drain)] == [("g-0", bench.now_s + 7.0)]


def test_a_replica_serves_until_its_time_is_short_when_nothing_stands_in_for_it() -> None:
    bench = a_bench(drain_s=10.0)
    bench.tick(16)
    bench.become("ready", "g-0", "g-1")
    bench.say(noticed("g-0", bench.now_s + 30.0))
    bench.become("gone", "g-2")  # the start failed
    assert drained(bench.tick(16, after_s=15.0)) == []
    assert drained(bench.tick(16, after_s=6.0)) == ["g-0"]


def test_a_start_on_a_machine_that_is_to_go_is_called_off() -> None:
    bench = a_bench()
    bench.tick(8)
    bench.become("starting", "g-0")
    said = bench.say(noticed("g-0", None))
    assert (deployed(said), drained(said)) == (["g-1"], ["g-0"])


def test_a_notice_of_nobody_or_of_somebody_elses_replica_drains_nothing() -> None:
    bench = a_bench()
    assert bench.say(noticed("unknown", 5.0)) == []
    bench.tick(8)
    bench.become("ready", "g-0")
    other = of_group("theirs", "ready", a_group())
    bench.say(other, noticed("theirs", 5.0))
    assert drained(bench.tick(8, after_s=10.0)) == []

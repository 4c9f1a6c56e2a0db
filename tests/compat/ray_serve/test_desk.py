"""The desk between Serve's requests and the router agent; no Ray in it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from swarmx.compat.ray_serve.answered import outcomes
from swarmx.compat.ray_serve.asked import call_from
from swarmx.compat.ray_serve.decision_log import DecisionLog
from swarmx.compat.ray_serve.desk import Desk
from swarmx.compat.ray_serve.options import RouterOptions
from swarmx.compat.ray_serve.signals import ReplicaSignal
from swarmx.compat.ray_serve.ticket import NoReplica, Seen, Ticket
from swarmx.compat.ray_serve.why import main as why
from swarmx.core.engine import EngineProfile
from swarmx.core.forecast import Forecast, point
from swarmx.core.messages import DemandReported, Message
from swarmx.core.nouns import Call, Decision
from swarmx.core.ports import Forecaster
from swarmx.core.prompts import Encoding, PromptText
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.runtime.clock import Clock, WallClock


def desk(
    *,
    most: int = 2,
    replicas: int = 2,
    decisions: DecisionLog | None = None,
    clock: Clock | None = None,
    reader: Forecaster | None = None,
    **options: object,
) -> Desk:
    def forecasters(post: Callable[[Message], None]) -> tuple[Forecaster, Forecaster | None]:
        return EmpiricalForecaster(), reader

    made = Desk(
        "app/model",
        RouterOptions(**{"log_dir": "" if decisions is None else "kept", **options}),  # type: ignore[arg-type]
        clock=clock or WallClock(),
        forecasters=forecasters,
        decisions=decisions,
    )
    made.replicas([Seen(replica_id=f"r{n}", max_ongoing=most) for n in range(replicas)])
    return made


def ticket(of: Desk, prompt: str = "hello", workflow: str = "w") -> Ticket:
    call, text = call_from(
        (prompt,),
        {},
        deployment=of.deployment,
        method="__call__",
        workflow_id=workflow,
        workflow_kind="/",
        session="",
    )
    return of.ticket(call, text)


async def serve(of: Desk, one: Ticket) -> str:
    found = await of.place(one)
    of.accepted(one)
    return found


async def learnt(one: Ticket) -> float:
    while one.work is None:
        await asyncio.sleep(0.001)
    return one.work


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"risk": 0.0, "hold": 0.67}),
        ({"parameters": {"risk": 1.0, "tail": 1.0}}, {"risk": 1.0, "hold": 0.67, "tail": 1.0}),
        ({"policy": "least_work"}, {}),
    ],
    ids=str,
)
def test_the_default_policy_takes_no_risk_into_account_unless_asked(given: Any, used: dict[str, float]) -> None:
    assert Desk.settings("app/model", RouterOptions(**given)).parameters == used


async def test_a_request_goes_to_a_replica_and_its_slot_is_free_again_at_its_end() -> None:
    at = desk(replicas=1)
    one = ticket(at)
    assert await serve(at, one) == "r0"
    assert at.in_flight("r0") == 1
    at.ended(one)
    assert at.in_flight("r0") == 0
    at.close()


async def test_a_request_waits_while_every_replica_is_full_and_goes_on_when_one_has_room() -> None:
    at = desk(most=1, replicas=1)
    first, second = ticket(at), ticket(at)
    await serve(at, first)
    waiting = asyncio.ensure_future(at.place(second))
    await asyncio.sleep(0)
    assert at.waiting == 1
    at.ended(first)
    assert await waiting == "r0"
    at.close()


async def test_a_replica_that_did_not_take_a_request_is_not_asked_again_while_another_is_there() -> None:
    at = desk(most=2, replicas=2)
    one = ticket(at)
    first = await at.place(one)
    second = await at.place(one, running=2)
    assert second != first
    assert at.in_flight(first) == 0
    at.close()


async def test_a_full_replica_is_not_chosen_on_the_word_of_the_replica_itself() -> None:
    at = desk(most=2, replicas=1)
    at.counted("r0", 2)
    waiting = asyncio.ensure_future(at.place(ticket(at)))
    await asyncio.sleep(0)
    assert not waiting.done()
    at.counted("r0", 1)
    assert await waiting == "r0"
    at.close()


async def test_a_lost_replica_ends_what_it_had_and_gets_nothing_more() -> None:
    at = desk(replicas=2)
    one = ticket(at)
    lost = await serve(at, one)
    at.lost(lost)
    assert one.over
    assert all([await serve(at, ticket(at)) != lost for _ in range(2)])
    at.close()


async def test_a_request_whose_answer_was_lost_is_placed_once_more() -> None:
    at = desk(replicas=2)
    one = ticket(at)
    lost = await serve(at, one)
    at.ended(one, failed="replica_gone")
    at.lost(lost)
    assert await at.place(one) != lost
    at.close()


async def test_a_cancelled_request_leaves_its_place_to_others() -> None:
    at = desk(most=1, replicas=1)
    first, second, third = ticket(at), ticket(at), ticket(at)
    await serve(at, first)
    waiting = asyncio.ensure_future(at.place(second))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    at.cancelled(first)
    assert await at.place(third) == "r0"
    assert at.in_flight("r0") == 1
    at.close()


async def test_a_place_that_nobody_claimed_is_given_back() -> None:
    at = desk(most=1, replicas=1)
    one = ticket(at)
    await at.place(one)
    at.give_back(one.sent_at_s + 9.0)
    assert at.in_flight("r0") == 1
    at.give_back(one.sent_at_s + 11.0)
    assert at.in_flight("r0") == 0
    at.close()


async def test_a_place_that_was_claimed_is_kept() -> None:
    at = desk(most=1, replicas=1)
    await serve(at, one := ticket(at))
    at.give_back(one.sent_at_s + 1000.0)
    assert at.in_flight("r0") == 1
    at.close()


async def test_what_a_pushed_signal_says_of_the_speed_decides() -> None:
    at = desk(most=8, replicas=2)
    slow = EngineProfile(model="m", device="ray", step_base_s=1.0)
    fast = EngineProfile(model="m", device="ray", step_base_s=0.001)
    for replica_id, profile in (("r0", slow), ("r1", fast)):
        at.heard(
            ReplicaSignal(
                deployment=at.deployment, replica_id=replica_id, at_s=1.0, running=0, profile=profile, calls=9
            )
        )
    assert {await serve(at, ticket(at)) for _ in range(4)} == {"r1"}
    at.close()


async def test_an_older_signal_than_the_last_does_not_count() -> None:
    at = desk(most=2, replicas=1)
    at.heard(ReplicaSignal(deployment=at.deployment, replica_id="r0", at_s=2.0, running=0))
    at.heard(ReplicaSignal(deployment=at.deployment, replica_id="r0", at_s=1.0, running=2))
    assert await serve(at, ticket(at)) == "r0"
    at.close()


class _Clock:
    def __init__(self) -> None:
        self.at_s = 100.0

    def now_s(self) -> float:
        return self.at_s


async def test_a_late_signal_counts_as_of_the_time_when_it_was_said() -> None:
    clock = _Clock()
    at = desk(most=1, replicas=1, clock=clock)
    behind_s = 1e9  # of the clock of the replica
    at.heard(ReplicaSignal(deployment=at.deployment, replica_id="r0", at_s=clock.at_s - behind_s, running=0))
    clock.at_s += 1.0
    first = ticket(at)
    await serve(at, first)
    clock.at_s += 1.0
    said_s = clock.at_s - behind_s  # while the first was there
    clock.at_s += 1.0
    at.ended(first)
    at.heard(ReplicaSignal(deployment=at.deployment, replica_id="r0", at_s=said_s, running=1))
    assert await serve(at, ticket(at)) == "r0"
    at.close()


class _Reader:
    """Says that every prompt is as long as it says it is."""

    def __init__(self) -> None:
        self.read: list[bytes] = []
        self.observed: list[str] = []

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        self.read.append(prompt.text)
        return Encoding(encoder="r", vector=np.zeros(1, dtype=np.float32))

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        return point(float(self.read[-1]), unit="tokens")

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        self.observed.append(encoding.encoder)


async def test_a_prompt_that_is_read_first_is_read_once_and_its_request_sent_by_what_it_says() -> None:
    reader = _Reader()
    at = desk(replicas=2, reader=reader, read_first=True)
    one = ticket(at, "77")
    first = await at.place(one)
    assert at._agent._calls[one.call.call_id].work_left == 77.0
    assert await at.place(one, running=2) != first
    at.ended(one)
    at.worked(one, 70.0)
    assert await learnt(one) == 70.0
    assert (reader.read, reader.observed) == ([b"77"], ["r"])
    at.close()


async def test_a_request_is_sent_before_its_prompt_is_read_and_then_counts_as_what_the_prompt_says() -> None:
    reader = _Reader()
    at = desk(replicas=1, reader=reader)
    one = ticket(at, "77")
    assert await serve(at, one) == "r0"
    assert reader.read == []
    while one.prompt is not None:
        await asyncio.sleep(0.001)
    assert one.forecast.mean == 77.0
    assert at._agent._calls[one.call.call_id].work_left == 77.0
    at.ended(one)
    at.worked(one, 70.0)
    assert await learnt(one) == 70.0
    assert (reader.read, reader.observed) == ([b"77"], ["r"])
    at.close()


async def test_a_prompt_is_read_while_its_request_waits_or_once_a_replica_has_taken_it() -> None:
    reader = _Reader()
    at = desk(most=1, replicas=1, reader=reader)
    sent, waits = ticket(at, "77"), ticket(at, "88")
    await at.place(sent)
    at.ask(waits)
    await asyncio.sleep(0.02)  # time enough to read both
    assert reader.read == [b"88"], "the other one is on its way: nobody is to stand in it"
    at.accepted(sent)
    while sent.prompt is not None:
        await asyncio.sleep(0.001)
    assert reader.read == [b"88", b"77"]
    at.close()


async def test_what_an_answer_tells_before_its_request_is_over_is_learnt_at_the_end() -> None:
    reader = _Reader()
    at = desk(replicas=1, reader=reader)
    one = ticket(at, "77")
    await serve(at, one)
    at.worked(one, 60.0)
    at.worked(one, 70.0)  # the last word counts
    assert reader.observed == []
    at.ended(one)
    at.worked(one, None)
    assert await learnt(one) == 70.0
    assert reader.observed == [""]
    at.close()


async def test_a_place_is_given_on_before_the_answer_of_whoever_had_it_is_learnt_from() -> None:
    reader = _Reader()
    at = desk(most=1, replicas=1, reader=reader)
    first, second = ticket(at, "70"), ticket(at, "80")
    await serve(at, first)
    waiting = at.ask(second)
    at.worked(first, 70.0)
    at.ended(first)
    assert waiting.done()
    assert reader.observed == []
    assert await learnt(first) == 70.0
    at.close()


async def test_the_time_from_which_a_place_was_sought_is_that_of_what_freed_it() -> None:
    clock = _Clock()
    at = desk(most=1, replicas=1, clock=clock)
    first, second = ticket(at), ticket(at)
    await serve(at, first)
    at.ask(second)
    clock.at_s += 7.0
    at.ended(first)
    clock.at_s += 1.0
    assert (at.since_placed_s(first), at.since_placed_s(second)) == (8.0, 1.0)
    at.close()


async def test_a_prompt_whose_request_is_over_is_not_read() -> None:
    reader = _Reader()
    at = desk(replicas=1, reader=reader)
    one = ticket(at, "77")
    await serve(at, one)
    at.ended(one)
    at._read(one)
    assert reader.read == []
    at.close()


async def test_a_pace_is_learnt_from_what_requests_took() -> None:
    at = desk(most=8, replicas=2)
    for _ in range(12):
        one = ticket(at)
        found = await serve(at, one)
        at.ended(one)
        one.took_s = 5.0 if found == "r0" else 0.1  # as if it had
        at.worked(one, 100.0)
        await learnt(one)
    assert [await serve(at, ticket(at)) for _ in range(3)] == ["r1"] * 3
    at.close()


async def test_every_decision_is_in_the_log_with_its_reasons(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "decisions.jsonl"
    at = desk(decisions=DecisionLog(path=path))
    one = ticket(at, "count to ten")
    found = await serve(at, one)
    at.close()
    [decision] = [msgspec.json.decode(line, type=Decision) for line in path.read_bytes().splitlines()]
    assert decision.replica_id == found
    assert decision.candidates.cost_s is not None
    assert b"count to ten" not in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("url", ["no url", "http://127.0.0.1:1", "http://127.0.0.1:{port}"])
async def test_decisions_are_kept_whatever_is_at_the_address_of_the_gateway(tmp_path: Path, url: str) -> None:
    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"this is no HTTP\r\n\r\n")
        writer.close()

    other = await asyncio.start_server(answered, "127.0.0.1", 0)
    log = DecisionLog(path=tmp_path / "d.jsonl", url=url.format(port=other.sockets[0].getsockname()[1]))
    at = desk(decisions=log)
    for lost in (1, 2):
        await serve(at, ticket(at))
        while log.lost < lost:
            await asyncio.sleep(0.01)
    other.close()
    at.close()
    assert len((tmp_path / "d.jsonl").read_bytes().splitlines()) == 2


async def test_without_any_replica_a_request_waits_and_is_given_up_at_last() -> None:
    at = desk(replicas=0, call_timeout_s=0.05)
    with pytest.raises(NoReplica):
        await at.place(ticket(at))
    at.close()


async def test_demand_is_reported_for_the_scaler() -> None:
    heard: list[DemandReported] = []
    at = desk()
    at._on_report = heard.append
    at._observe(demand(), 0.0)
    assert heard == [demand()]
    at.close()


def demand() -> DemandReported:
    return DemandReported(
        model="app/model",
        window_s=1.0,
        arrived=1,
        arrived_work=1.0,
        finished=0,
        in_flight=1,
        waiting=0,
        work_left=1.0,
        work_per_call=1.0,
        horizons_s=(1.0,),
        upcoming_mean=(0.0,),
        upcoming_p90=(0.0,),
        fresh_mean=(1.0,),
    )


def test_only_errors_of_the_replica_speak_against_it() -> None:
    assert outcomes(None) is None
    assert outcomes("an answer") is None
    assert outcomes(type("ActorDiedError", (Exception,), {})()) == "replica_gone"
    assert outcomes(ValueError()) == "rejected"


async def test_a_file_of_decisions_tells_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decisions.jsonl"
    at = desk(decisions=DecisionLog(path=path))
    one = ticket(at)
    await serve(at, one)
    at.close()
    assert why([str(path)]) == 0
    assert f"Attempt 1 of {one.call.call_id}" in capsys.readouterr().out
    assert why([str(path), "another"]) == 1
    assert why([str(tmp_path / "missing")]) == 2


async def test_what_waits_when_a_replica_is_lost_goes_to_another(caplog: pytest.LogCaptureFixture) -> None:
    at = desk(most=1, replicas=2)
    first, second = ticket(at), ticket(at)
    lost, kept = await serve(at, first), await serve(at, second)
    waiting = asyncio.ensure_future(at.place(ticket(at)))
    await asyncio.sleep(0)
    at.lost(lost)
    await asyncio.sleep(0)
    assert not waiting.done()
    at.ended(second)
    assert await waiting == kept
    assert not caplog.records
    at.close()

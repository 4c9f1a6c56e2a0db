"""What is announced happens and is closed; what cannot be announced does not happen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from swarmx.core.control import Actor, Change
from swarmx.core.errors import ReplicaError
from swarmx.runtime.audited import Ending, Errand, carry_out
from tests.runtime.audits import MemoryAudit

ANN = Actor(type="key", name="ann", role="operator")


def errand(intent_seq: int | None = None) -> Errand:
    return Errand(
        tool="drain",
        arguments={"replica_id": "r"},
        effect="irreversible",
        change=Change(subject="r", what="state", before="ready", after="gone"),
        actor=ANN,
        via="cli",
        intent_seq=intent_seq,
    )


async def works() -> Ending:
    return "applied", "fine"


def raises(error: BaseException) -> Callable[[], asyncio.Future[Ending]]:
    async def fail() -> Ending:
        raise error

    return lambda: asyncio.ensure_future(fail())


async def test_an_effect_lies_between_its_intent_and_its_outcome() -> None:
    audit = MemoryAudit()
    seen: list[int] = []

    async def effect() -> Ending:
        seen.append(len(audit.records))
        return "applied", "fine"

    assert await carry_out(audit, errand(), effect)
    assert seen == [1]
    intent, outcome = [record.entry for record in audit.records]
    assert (intent.kind, intent.actor, intent.via, intent.tool) == ("intent", ANN, "cli", "drain")
    assert (intent.arguments, intent.effect, intent.changes) == (
        {"replica_id": "r"},
        "irreversible",
        (errand().change,),
    )
    assert (outcome.kind, outcome.intent_seq, outcome.outcome, outcome.detail) == ("outcome", 1, "applied", "fine")


async def test_an_intent_that_is_there_already_is_not_written_again() -> None:
    audit = MemoryAudit()
    assert await carry_out(audit, errand(intent_seq=7), works)
    assert [(r.entry.kind, r.entry.intent_seq) for r in audit.records] == [("outcome", 7)]


async def test_what_cannot_be_announced_does_not_happen(caplog: pytest.LogCaptureFixture) -> None:
    audit = MemoryAudit()
    audit.broken = True
    happened = asyncio.Event()

    async def effect() -> Ending:
        happened.set()
        return "applied", ""

    assert not await carry_out(audit, errand(), effect)
    assert not happened.is_set()
    assert "drain r is not done, the audit log cannot be written: the disk is full" in caplog.text


@pytest.mark.parametrize(
    ("error", "detail"), [(ReplicaError("it is ill"), "it is ill"), (KeyError("x"), "KeyError: 'x'")]
)
async def test_an_effect_that_raises_has_failed(error: Exception, detail: str) -> None:
    audit = MemoryAudit()
    assert not await carry_out(audit, errand(), raises(error))
    assert (audit.last().outcome, audit.last().detail) == ("failed", detail)


async def test_an_outcome_that_is_no_success_is_told() -> None:
    async def stale() -> Ending:
        return "stale", "it is as it was"

    audit = MemoryAudit()
    assert not await carry_out(audit, errand(), stale)
    assert audit.last().outcome == "stale"


async def test_an_effect_that_is_called_off_was_interrupted() -> None:
    audit = MemoryAudit()
    begun = asyncio.Event()

    async def effect() -> Ending:
        begun.set()
        await asyncio.Event().wait()
        return "applied", ""

    task = asyncio.create_task(carry_out(audit, errand(), effect))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert audit.outcomes() == [("drain", "interrupted")]


async def test_an_intent_that_is_called_off_while_it_is_written_gets_its_outcome() -> None:
    audit = MemoryAudit()
    audit.open.clear()
    task = asyncio.create_task(carry_out(audit, errand(), works))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    audit.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert audit.outcomes() == [("drain", "interrupted")]
    audit.check()


async def test_an_outcome_that_cannot_be_written_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    audit = MemoryAudit()

    async def effect() -> Ending:
        audit.broken = True
        return "applied", "fine"

    assert await carry_out(audit, errand(), effect)
    assert "its outcome ('applied', 'fine') is not in the audit log" in caplog.text

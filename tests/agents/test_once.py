"""What may be begun once only is not tried elsewhere while nobody knows what its replica has done."""

from __future__ import annotations

import pytest

from swarmx.agents.router import RouterAgent
from swarmx.core.actions import Refuse
from swarmx.core.messages import Message, TimerFired
from tests.agents.worlds import changed, dispatches, failed, ready


def sent(*, once: bool) -> RouterAgent:
    """A router that has sent the call "c" to "a", and has "b" beside it."""
    router = RouterAgent()
    router.handle(changed("a"), 0.0)
    assert dispatches(router.handle(ready("c", once=once), 0.0)) == ["a"]
    router.handle(changed("b"), 0.0)
    return router


@pytest.mark.parametrize(
    "lost", [changed("a", "gone"), TimerFired(key="answer:c"), failed("c", reason="connection_lost", retryable=False)]
)
def test_a_call_for_once_ends_with_its_replica(lost: Message) -> None:
    outputs = sent(once=True).handle(lost, 1.0)
    assert dispatches(outputs) == []
    (refused,) = [output for output in outputs if isinstance(output, Refuse)]
    assert (refused.call_id, refused.reason, refused.attempts) == ("c", "failed", 1)


@pytest.mark.parametrize("lost", [changed("a", "gone"), TimerFired(key="answer:c")])
def test_other_calls_go_elsewhere(lost: Message) -> None:
    assert dispatches(sent(once=False).handle(lost, 1.0)) == ["b"]


def test_a_call_for_once_goes_elsewhere_where_nothing_was_begun() -> None:
    assert dispatches(sent(once=True).handle(failed("c", reason="connect", retryable=True), 1.0)) == ["b"]

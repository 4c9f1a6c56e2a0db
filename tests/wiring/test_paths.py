"""A whole server tells its router how long workflows still take, by the weights that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarmx.core.nouns import SeenWorkflow
from tests.gateway.whole import MODEL, whole

pytestmark = pytest.mark.process

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}
HEADERS = {"x-swarmx-workflow-id": "w", "x-swarmx-workflow-kind": "report"}


async def seen(folder: Path, **predictor: object) -> list[SeenWorkflow]:
    """What the router knew of an undeclared workflow at each of its first two calls."""
    found = []
    async with (
        whole(folder, predictor={"budget_ms": 1000.0, **predictor}) as world,
        world.client("operator") as client,
    ):
        for _ in range(2):
            reply = await client.post("/v1/chat/completions", json=CHAT, headers=HEADERS)
            assert reply.status_code == 200, reply.text
            await world.context.flush()
            (decision,) = await world.context.store.decisions(reply.headers["x-swarmx-call-id"], tenant=None)
            assert decision.workflow is not None
            found.append(decision.workflow)
    return found


async def test_the_router_counts_on_the_predictors_word_if_that_is_wanted_and_else_on_its_own(tmp_path: Path) -> None:
    told = await seen(tmp_path / "told", paths=True)
    unasked = await seen(tmp_path / "unasked")
    alone = await seen(tmp_path / "alone", paths=True, engine="empirical")
    assert [[workflow.calls for workflow in some] for some in (told, unasked, alone)] == [[0, 1]] * 3
    assert len({workflow.remaining_s for workflow in told}) == 2  # it learnt from the first call
    assert len({workflow.remaining_s for workflow in unasked}) == 1  # nobody knows workflows of this kind
    assert len({workflow.remaining_s for workflow in alone}) == 1

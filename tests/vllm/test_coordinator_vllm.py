"""The coordinator asks a real vLLM on this CPU: form and safety are asserted, not good sense (`make test-vllm`)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
import pytest_asyncio

from swarmx.core.control import AlertSeen
from swarmx.providers.coordinator_model import CoordinatorModel
from swarmx.providers.process import DEFAULT_MODEL
from swarmx.runtime.model import OpenAiModel
from tests.e2e.fleet import children
from tests.llm_coordinator.test_prompt import the_largest_prompt
from tests.runtime.desks import REGISTRY, Office, an_office

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="make setup-vllm fetches the model"),
]
_NAME = "small"
_CONTEXT_TOKENS = 4096  # what scripts/vllm/serve.sh allows
_DEADLINE_S = 300.0  # of a busy CPU


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CoordinatorModel]:
    own = CoordinatorModel(model_dir=DEFAULT_MODEL, name=_NAME, log=tmp_path_factory.mktemp("vllm") / "log")
    task = asyncio.create_task(own.run())
    await until(lambda: own.url is not None)
    yield own
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest_asyncio.fixture(loop_scope="module")
async def model(server: CoordinatorModel) -> AsyncIterator[OpenAiModel]:
    one = OpenAiModel(url=lambda: server.url, name=_NAME)
    yield one
    await one.close()


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(600):
        while not happened():
            await asyncio.sleep(0.1)


async def crowded(model: OpenAiModel) -> Office:
    """A model at its bound, with calls that wait."""
    office = await an_office(model, mode="auto", deadline_s=_DEADLINE_S)
    office.world.bounds["coder"] = (1, 2)
    office.world.loads["coder"].waiting = 12
    office.alerts = (AlertSeen(at_s=office.world.at_s, kind="at_max", subject="coder", value=4.0),)
    return office


async def test_a_turn_of_the_real_model_is_a_valid_call_or_a_named_fallback(model: OpenAiModel) -> None:
    office = await crowded(model)
    turn = await office.coordinator.turn("at_max")
    REGISTRY.understand(turn.call)
    assert (turn.source == "rules") == bool(turn.fallback)
    assert turn.outcome in ("no_op", "applied", "open") or turn.outcome.startswith("refused:")
    if turn.source != "rules":  # no answer, or one that came too late, has no usage
        assert turn.prompt_tokens > 0
        assert turn.output_tokens > 0
    assert office.episode(turn).outcome == turn.outcome


async def test_the_largest_prompt_fits_the_real_model(model: OpenAiModel) -> None:
    prompt = the_largest_prompt()
    reply = await model.reply(prompt, deadline_s=_DEADLINE_S)
    assert reply.error in (None, "too_long"), reply.detail
    assert reply.prompt_tokens + prompt.max_tokens <= _CONTEXT_TOKENS


async def test_a_server_that_is_killed_is_replaced_by_the_rules(server: CoordinatorModel, model: OpenAiModel) -> None:
    (pid,) = [pid for pid, command in children(os.getpid()).items() if "vllm" in command]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: server.url is None)
    office = await crowded(model)
    turn = await office.coordinator.turn("at_max")
    assert (turn.source, turn.fallback) == ("rules", "the model cannot be reached.")
    assert turn.call.arguments == {"model": "coder", "min_replicas": 1, "max_replicas": 4}
    assert turn.outcome == "applied"

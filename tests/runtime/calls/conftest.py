"""Scenes for tests of calls, taken down after each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from swarmx.agents.router_settings import RouterSettings
from swarmx.core.ports import Forecaster
from swarmx.neural.empirical import EmpiricalForecaster
from tests.runtime.calls.scenes import Make, Scene


@pytest.fixture
async def scene() -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        def make(
            *,
            forecaster: Forecaster | None = None,
            refiner: Any = None,
            path_of: Any = None,
            on_prompt: Any = None,
            on_answer: Any = None,
            keep: Any = None,
            **patience: Any,
        ) -> Scene:
            settings = RouterSettings(**{"policy": "round_robin", **patience})
            plain_or = forecaster or EmpiricalForecaster()
            made = Scene(
                stack,
                settings,
                plain_or,
                refiner=refiner,
                path_of=path_of,
                on_prompt=on_prompt,
                on_answer=on_answer,
                keep=keep,
            )
            stack.push_async_callback(made.upstream.close)
            stack.callback(made.shell.close)
            return made

        yield make

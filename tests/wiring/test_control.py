"""How the slow side is put together: what is set for a tool that does not exist is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarmx.config import parse
from swarmx.core.errors import ConfigError
from swarmx.wiring import running
from tests.e2e.fleet import peers, until


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("coordinator", "modes", {"set_replica_bound": "auto"}),
        ("guard", "cooldown_s", {"set_replica_bound": 10.0}),
        ("guard", "per_hour", {"set_replica_bound": 1}),
        ("guard", "auto_irreversible", ["set_replica_bound"]),
    ],
)
async def test_a_setting_for_a_tool_that_does_not_exist_names_the_nearest(
    tmp_path: Path, section: str, setting: str, value: Any
) -> None:
    settings = parse({"state": {"dir": str(tmp_path / "state")}, section: {setting: value}})
    problem = rf"{section}\.{setting}: there is no tool 'set_replica_bound'.*Did you mean 'set_replica_bounds'\?"
    with pytest.raises(ConfigError, match=problem):
        async with running(settings):
            pass


@pytest.mark.process
async def test_the_status_tells_that_the_breaker_makes_the_coordinator_only_observe(tmp_path: Path) -> None:
    async with peers(chatty="fine") as found:  # answers in plain text, and never with a tool call
        coordinator = {"engine": "openai", "url": found["chatty"].url, "every_s": 0.05, "gap_s": 0.05}
        settings = parse({"state": {"dir": str(tmp_path / "state")}, "coordinator": coordinator})
        async with running(settings) as (_, context):

            async def observes() -> bool:
                return context.coordinator().observes_until_s is not None

            await until(observes, lambda yes: yes)
            until_s = context.coordinator().observes_until_s
            assert until_s is not None
            assert until_s - context.clock.now_s() == pytest.approx(900.0, abs=60.0)

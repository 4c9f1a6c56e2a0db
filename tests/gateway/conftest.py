"""What tests of the gateway share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.workflow_world import World, world_in


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A SwarmX for what happens to workflows; other modules have a world of their own."""
    async with world_in(tmp_path / "state") as found:
        yield found

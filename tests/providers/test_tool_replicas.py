"""Replicas of tools as processes that come and go: what they are told, what they inherit, and their ends."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from swarmx.core.errors import ReplicaError
from swarmx.core.nouns import Replica, ReplicaGroup
from swarmx.providers.tool_replicas import ToolReplicas, read_pool, tool_profile
from tests.e2e.fleet import alive, children
from tests.providers.tools.workshop import until

pytestmark = pytest.mark.process

WEB = """
pool = "web"
slots = 3
[[http]]
name = "fetch"
description = "Asks."
hosts = ["api.example"]
secret_headers = { authorization = "API_SECRET" }
"""
GROUP = ReplicaGroup(
    group_id="web-cpu", model="web", kind="tool", device="cpu", provider="tools", profile=tool_profile("web", 3),
    min_replicas=1, max_replicas=2, limit=2, start_s=1.0,
)  # fmt: skip


@pytest.fixture
async def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ToolReplicas]:
    monkeypatch.setenv("API_SECRET", "for-the-api")
    monkeypatch.setenv("OTHER_SECRET", "for-the-gateway")
    (tmp_path / "web.toml").write_text(WEB)
    made = ToolReplicas({"web": read_pool(tmp_path / "web.toml", count=1)}, logs=tmp_path / "logs")
    yield made
    await made.stop()


async def status(replica: Replica, token: str | None) -> int:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession() as session, session.get(f"{replica.url}/v1/tools", headers=headers) as response:
        return response.status


def pids() -> list[int]:
    return [pid for pid, line in children(os.getpid()).items() if "swarmx.providers.tools" in line]


async def test_each_has_a_token_of_its_own_and_no_more_secrets_than_its_file_names(replicas: ToolReplicas) -> None:
    (fixed,) = await replicas.start()
    more = await replicas.deploy("web-cpu-7", GROUP)
    assert (fixed.replica_id, fixed.model, fixed.kind, fixed.profile.max_batch) == ("web-cpu-0", "web", "tool", 3)
    tokens = [replicas.token_of(replica.replica_id) for replica in (fixed, more)]
    assert [await status(replica, token) for replica, token in zip((fixed, more), tokens, strict=True)] == [200, 200]
    assert [await status(fixed, tokens[1]), await status(fixed, None)] == [401, 401]
    for pid in pids():
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"API_SECRET=for-the-api" in environment
        assert b"OTHER_SECRET" not in environment
    await replicas.retire("web-cpu-7")
    assert (len(pids()), replicas.token_of("web-cpu-7")) == (1, None)
    await replicas.retire("web-cpu-7")
    await replicas.stop()
    assert pids() == []


async def test_one_that_died_can_be_retired_and_deployed_again(replicas: ToolReplicas) -> None:
    await replicas.deploy("web-cpu-1", GROUP)
    with pytest.raises(ReplicaError, match="running already"):
        await replicas.deploy("web-cpu-1", GROUP)
    (pid,) = pids()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    await replicas.retire("web-cpu-1")
    replica = await replicas.deploy("web-cpu-1", GROUP)
    assert await status(replica, replicas.token_of("web-cpu-1")) == 200


async def test_one_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path, replicas: ToolReplicas) -> None:
    (tmp_path / "web.toml").write_text(WEB + "[[")
    with pytest.raises(ReplicaError, match=r"did not start, exit status 1: .*not TOML"):
        await replicas.start()
    assert pids() == []
    with pytest.raises(ReplicaError, match="there is no pool of tools 'x', only: web"):
        await replicas.deploy(
            "x-cpu-0", ReplicaGroup(**{**{f: getattr(GROUP, f) for f in GROUP.__struct_fields__}, "model": "x"})
        )

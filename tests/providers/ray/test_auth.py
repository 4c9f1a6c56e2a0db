"""Ray's own token lets a gateway in, and a wrong one does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from swarmx.core.errors import ReplicaError
from tests.contract.test_providers import healthy
from tests.providers.ray.conftest import HAS_RAY, NO_RAY, ROOT, Nodes
from tests.providers.ray.test_on_ray import SOUND, heard

pytestmark = [pytest.mark.skipif(not HAS_RAY, reason=NO_RAY), pytest.mark.process, pytest.mark.timeout(600)]

TOKEN = "a-token-of-ray-that-is-32-bytes-long"


async def test_the_token_that_ray_reads_is_all_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.providers.ray.guarded"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address
        ours = heard(Nodes(cluster=None, address=address, workers={}), "auth")
        replica = await ours.provider.deploy("a", SOUND)
        assert await healthy(replica.url)
        await ours.provider.stop()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token-that-is-not-the-right-one")
        theirs = heard(Nodes(cluster=None, address=address, workers={}), "auth")
        with pytest.raises(ReplicaError, match="no link to Ray"):
            await theirs.provider.start()
        await theirs.provider.stop()
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)

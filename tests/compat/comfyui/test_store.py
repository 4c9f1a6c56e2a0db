"""What is kept of a job, and how many may wait."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.compat.comfyui.fake import FakeComfy, graph, serving
from tests.compat.comfyui.fronts import front

pytestmark = pytest.mark.process


async def test_a_key_for_a_paid_service_is_not_kept_longer_than_the_job_runs(tmp_path: Path) -> None:
    fake, secret = FakeComfy(), {"extra_data": {"api_key_comfy_org": "comfy-secret", "other": 1}}
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            _, _, entry = await client.run(graph(), **secret)
            fake.stuck = True
            for seed in (2, 3):
                _, last = await client.submit(graph(seed), **secret)
            await client.ask("POST", f"/api/jobs/{last['prompt_id']}/cancel")
            fake.stuck = False
        async with front(tmp_path, fake) as client:
            await client.run(graph(4))
            _, ended = await client.ask("GET", f"/api/jobs/{last['prompt_id']}")
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert entry["prompt"][3]["other"] == ended["workflow"]["extra_data"]["other"] == 1
    assert b"comfy-secret" not in kept


async def test_graphs_that_come_together_do_not_pass_the_bound_on_waiting_ones(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, max_waiting=3) as client:
        fake.stuck = True
        answers = await asyncio.gather(*(client.submit(graph(seed)) for seed in range(20)))
        fake.stuck = False
    statuses = [status for status, _ in answers]
    assert statuses.count(200) <= 4, "one runs, three wait"
    assert statuses.count(200) + statuses.count(429) == 20

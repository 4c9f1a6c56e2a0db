"""What a front leaves behind of its decisions, and of what it learnt."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import pytest

from swarmx.compat.comfyui.kept_costs import FILE_NAME
from swarmx.memory.audit import read_log, verify_files
from swarmx.neural.node_costs import NodeCosts
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import eventually, front

pytestmark = pytest.mark.process


async def test_where_jobs_went_and_what_was_stopped_is_in_a_sound_audit_log(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        ran, _, _ = await client.run(graph())
        fake.stuck = True
        _, answer = await client.submit(graph(2))
        stopped = answer["prompt_id"]
        await eventually(lambda: _runs(fake, stopped))
        await client.ask("POST", "/interrupt", {"prompt_id": stopped})
        await client.ask("POST", "/free", {"free_memory": True})
        fake.stuck = False
        await client.ended(stopped)
    notes = [record.entry for record in read_log(tmp_path / "audit.jsonl")]
    placed = [note.arguments for note in notes if note.tool == "comfyui.place"]
    assert [(row["job"], row["server"], row["policy"]) for row in placed] == [
        (ran, "s1", "marginal"),
        (stopped, "s1", "marginal"),
    ]
    assert placed[0]["forecast_p50_s"] > 0.0
    told = {note.tool: note for note in notes}
    assert told["comfyui.stop"].arguments["jobs"] == [stopped]
    assert told["comfyui.free"].arguments["servers"] == ["s1"]
    assert told["comfyui.free"].actor.name == "anybody"
    assert verify_files(tmp_path).sound


async def _runs(fake: FakeComfy, prompt_id: str) -> bool:
    return prompt_id in fake.received


async def test_nothing_is_noted_where_that_is_not_wanted(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake, audit=False) as client:
        await client.run(graph())
    assert not (tmp_path / "audit.jsonl").exists()


async def test_swarmx_why_explains_a_job_of_the_front_and_what_another_policy_had_done(tmp_path: Path) -> None:
    fakes = (FakeComfy(), FakeComfy())
    async with serving(*fakes), front(tmp_path / "front", *fakes) as client:
        prompt_id, _, entry = await client.run(graph())
        (tmp_path / "admin.token").write_text("not needed here")
        command = ("--url", client.url, "--state-dir", str(tmp_path), "why", prompt_id, "--policy", "round_robin")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "swarmx", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said = (await process.communicate())[0].decode()
        status, wrong = await client.ask("GET", f"/swarmx/why/{prompt_id}?policy=none-such")
    assert process.returncode == 0, said
    assert entry["swarmx"]["server"] in said
    assert "round_robin" in said
    assert (status, wrong["error"]["type"]) == (400, "invalid_query")


async def test_what_nodes_cost_is_known_to_the_next_life_of_a_front(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.01)
    async with serving(fake):
        async with front(tmp_path, fake) as client:
            await client.run(graph(1, steps=30))
        kept = NodeCosts.loaded((tmp_path / FILE_NAME).read_bytes())
        async with front(tmp_path, fake) as client:
            _, _, entry = await client.run(graph(2, steps=30))
    assert kept.forecast("s1", []).source == "empirical"
    assert kept.forecast("s2", []).source == "prior"
    assert entry["swarmx"]["forecast_p50_s"] < 10.0, "a guess would be more than twenty seconds"


async def test_costs_that_cannot_be_read_are_put_aside_and_learnt_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_text('{"format": 99, "lines": [], "servers": []}')
    fake = FakeComfy()
    with caplog.at_level(logging.WARNING):
        async with serving(fake), front(tmp_path, fake) as client:
            await client.run(graph())
    assert "have the format 99, this version knows 1" in caplog.text
    assert "99" in (tmp_path / f"{FILE_NAME}.refused").read_text()
    assert NodeCosts.loaded((tmp_path / FILE_NAME).read_bytes()).forecast("s1", []).source == "empirical"

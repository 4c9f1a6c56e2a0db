"""What the jobs API shows of jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.compat.comfyui.jobs import Job
from swarmx.compat.comfyui.jobs_api import brief
from swarmx.compat.comfyui.store import StoredJob
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import eventually, front


def shown(outputs: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """A job that has made this, in a list."""
    job = Job(
        prompt_id="1",
        tenant="t",
        client_id=None,
        number=1.0,
        seq=1,
        priority=0,
        graph=graph(),
        extra=extra,
        outputs=("9",),
        files=frozenset(),
        created_s=1.0,
    )
    history = msgspec.json.encode({"outputs": outputs})
    return brief(
        StoredJob(job=job, state="completed", server="s1", attempts=1, started_s=1.0, ended_s=2.0, history=history)
    )


def test_a_saved_file_stands_for_a_job_rather_than_one_that_was_only_shown() -> None:
    files = [{"filename": f"{name}.png", "subfolder": "", "type": name} for name in ("temp", "output")]
    row = shown({"7": {"images": files[:1]}, "9": {"images": files[1:], "animated": [False]}})
    assert row["preview_output"] == files[1] | {"nodeId": "9", "mediaType": "images"}
    assert row["outputs_count"] == 2
    assert shown({"7": {"images": files[:1]}})["preview_output"]["nodeId"] == "7"


def test_a_file_that_cannot_be_shown_stands_for_no_job() -> None:
    latent = {"filename": "a.latent", "subfolder": "", "type": "output"}
    film = {"filename": "a.mp4", "subfolder": "", "type": "output", "format": "video/h264-mp4"}
    assert "preview_output" not in shown({"9": {"latents": [latent]}})
    assert shown({"9": {"latents": [latent], "gifs": [film]}})["preview_output"]["filename"] == "a.mp4"


@pytest.mark.parametrize("workflow", [None, 3, {"id": 3}, [], {"id": ["w"]}])
def test_what_is_no_workflow_has_no_id(workflow: object) -> None:
    assert "workflow_id" not in shown({}, extra_pnginfo={"workflow": workflow})


@pytest.mark.process
async def test_jobs_of_a_workflow_are_found_wherever_they_are(tmp_path: Path) -> None:
    fake = FakeComfy()

    def of(workflow: str) -> dict[str, Any]:
        return {"extra_data": {"extra_pnginfo": {"workflow": {"id": workflow}}}}

    async with serving(fake), front(tmp_path, fake) as client:
        done = [(await client.run(graph(seed), **of(name)))[0] for seed, name in ((1, "w1"), (2, "w2"))]
        fake.stuck = True
        sent = [(await client.submit(graph(3 + n), **of(name)))[1] for n, name in enumerate(("w1", "w1", "w2"))]

        async def runs() -> bool:
            return sent[0]["prompt_id"] in fake.received

        await eventually(runs)
        _, page = await client.ask("GET", "/api/jobs?workflow_id=w1&sort_order=asc")
        _, every = await client.ask("GET", "/api/jobs")
        fake.stuck = False
    assert [(row["id"], row["status"]) for row in page["jobs"]] == [
        (done[0], "completed"),
        (sent[0]["prompt_id"], "in_progress"),
        (sent[1]["prompt_id"], "pending"),
    ]
    assert {row["workflow_id"] for row in page["jobs"]} == {"w1"}
    assert page["jobs"][0]["preview_output"]["nodeId"] == "9"
    assert (page["pagination"]["total"], every["pagination"]["total"]) == (3, 5)

"""The fake, and the front over it, say what a real server said to the same requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fronts import front
from tests.compat.comfyui.record import talk

pytestmark = pytest.mark.process

RECORDED = json.loads((Path(__file__).parent / "recordings" / "comfyui-0.3.64.json").read_text())
_PARTLY = ("/object_info/KSampler", "/system_stats", "/features")  # the fake leaves out what nothing here reads


def _same(said: dict[str, Any], *, front: bool) -> None:
    assert said["refused"] == RECORDED["refused"]
    for path, recorded in RECORDED["gets"].items():
        found = said["gets"][path]
        if path in _PARTLY:
            assert found["status"] == recorded["status"]
            assert set(found["body"]) <= set(recorded["body"])
        else:
            assert found == recorded, path
    for name, recorded in RECORDED["runs"].items():
        run = said["runs"][name]
        assert run["order"] == recorded["order"], name
        for kind, shapes in recorded["shapes"].items():
            if kind == "progress_state":  # states of nodes that are there together differ from moment to moment
                assert run["shapes"].get(kind), name
            elif kind in ("execution_error",):
                assert [set(row) for row in run["shapes"][kind]] == [set(row) for row in shapes]
            else:
                assert run["shapes"][kind] == shapes, (name, kind)
        _same_history(run["history"], recorded["history"], front=front)


def _same_history(found: dict[str, Any], recorded: dict[str, Any], *, front: bool) -> None:
    if front:
        assert found.pop("swarmx")
        for row in found["prompt"]:
            if isinstance(row, dict):
                row.pop("create_time", None)
        found["prompt"].sort(key=json.dumps)
        recorded = recorded | {"prompt": sorted(recorded["prompt"], key=json.dumps)}
    if recorded["status"]["status_str"] == "error":
        assert found["status"]["status_str"] == "error"
        assert [m[0] for m in found["status"]["messages"]] == [m[0] for m in recorded["status"]["messages"]]
        found, recorded = ({**row, "status": None} for row in (found, recorded))
    assert found == recorded


async def test_the_fake_says_what_a_real_server_said() -> None:
    fake = FakeComfy(step_s=0.002)
    async with serving(fake):
        _same(await talk(fake.url, saved="tiny.safetensors", seed=5), front=False)


async def test_the_front_says_what_a_server_would_say(tmp_path: Path) -> None:
    fake = FakeComfy(step_s=0.002)
    async with serving(fake), front(tmp_path, fake) as client:
        _same(await talk(client.url, saved="tiny.safetensors", seed=5), front=True)

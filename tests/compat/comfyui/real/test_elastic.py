"""Real ComfyUI servers that the scaler starts for an `image` node of a workflow, and ends: `make test-comfyui`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.real.behind_front import for_comfyui
from tests.e2e.fleet import Http, alive, children, serving, until

ROOT = Path(__file__).parents[4]
COMFYUI = os.environ.get("COMFYUI_DIR")
_PATIENCE_S = 400.0
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.process,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COMFYUI is None, reason="needs a checkout of ComfyUI: make test-comfyui COMFYUI_DIR=..."),
]
DRAW = {
    "name": "draw",
    "nodes": {"draw": {"kind": "image", "model": "tiny", "prompt": "a bee", "width": 128, "height": 64, "steps": 2}},
    "outputs": {"sha256": "{{ draw.images | pick('sha256') | first }}"},
}


def _python(folder: Path) -> Path:
    """ComfyUI's interpreter with the environment that it needs."""
    shim = folder / "python"
    set_up = [f"{name}='{value}'" for name, value in for_comfyui().items()]
    inner = os.environ.get("COMFYUI_PYTHON", "python3")
    shim.write_text(f'#!/bin/sh\nexec env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 {" ".join(set_up)} {inner} "$@"\n')
    shim.chmod(0o755)
    return shim


def _group(folder: Path) -> dict[str, object]:
    """The options of a group whose servers have a tiny checkpoint, and an empty page to serve."""
    models = folder / "base" / "models" / "checkpoints"
    models.mkdir(parents=True)
    (folder / "base" / "custom_nodes").mkdir()
    script = ROOT / "scripts" / "tiny_checkpoint.py"
    subprocess.run([sys.executable, str(script), str(models / "tiny.safetensors")], check=True)
    page = folder / "page"
    page.mkdir()
    (page / "index.html").write_text("<html></html>")
    wanted = graph()
    wanted["6"]["inputs"]["text"] = "$prompt"
    wanted["5"]["inputs"] |= {"width": "$width", "height": "$height"}
    wanted["3"]["inputs"] |= {"steps": "$steps", "seed": "$seed"}
    (folder / "graph.json").write_text(json.dumps(wanted))
    return {
        "model": "tiny",
        "device": "cpu",
        "provider": "comfyui",
        "folder": str(COMFYUI),
        "python": str(_python(folder)),
        "graph": str(folder / "graph.json"),
        "options": [
            *("--cpu", "--disable-all-custom-nodes", "--disable-api-nodes"),
            *("--front-end-root", str(page), "--base-directory", str(folder / "base")),
        ],
        "min": 0,
    }


async def test_a_server_starts_for_a_picture_makes_it_and_ends_when_it_is_drained(tmp_path: Path) -> None:
    settings = {
        "watch": {"every_s": 1.0, "timeout_s": 60.0},
        "router": {"demand_every_s": 0.5, "queue_timeout_s": _PATIENCE_S},
        "scaler": {"policy": "target_tracking", "every_s": 0.5, "drain_s": 60.0, "up_cooldown_s": 0.0},
        "elastic": [_group(tmp_path)],
    }
    with serving(settings, tmp_path) as server:
        async with server.http() as http:
            assert await http.replicas() == {}
            drawn = await http.ended(await http.submitted(DRAW), deadline_s=_PATIENCE_S)
            assert drawn["state"] == "finished", drawn
            picture = await http.get(f"/api/v1/blobs/{drawn['outputs']['sha256']}")
            (comfy,) = [pid for pid, line in children(server.process.pid).items() if "main.py" in line]
            await _drain(http, "tiny-cpu-0")
            rows = await until(
                http.replicas, lambda rows: rows["tiny-cpu-0"]["state"] == "gone", deadline_s=_PATIENCE_S
            )
            await until(lambda: _lives(comfy), lambda lives: not lives, deadline_s=60.0)
        assert server.stop() == 0
    assert Image.open(io.BytesIO(picture.body)).size == (128, 64)
    assert rows["tiny-cpu-0"]["elastic"]


async def _drain(http: Http, replica_id: str) -> None:
    order = {"arguments": {"replica_id": replica_id, "force": True}, "dry_run": False, "reason": "test"}
    reply = await http.post("/api/v1/tools/drain_replica", json=order)
    assert reply.status == 200, reply


async def _lives(pid: int) -> bool:
    return alive(pid)

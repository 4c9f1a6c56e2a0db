"""ComfyUI servers that SwarmX starts and stops, and `image` nodes of workflows on them; the servers are fakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.compat.comfyui.fake import PNG
from tests.compat.comfyui.fake_nodes import graph
from tests.e2e.fleet import Http, alive, children, serving, until

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
CHECKOUT = f"""
import asyncio, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.compat.comfyui.fake import main
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert pathlib.Path(given["--output-directory"]).is_dir()
print("options", given["--listen"], "--cpu" in sys.argv, flush=True)
asyncio.run(main())
"""
DRAW = {
    "name": "draw",
    "nodes": {"draw": {"kind": "image", "model": "tiny", "prompt": "a bee", "width": 64, "height": 64, "steps": 2}},
    "outputs": {"sha256": "{{ draw.images | pick('sha256') | first }}"},
}


async def test_servers_of_a_group_come_and_go_and_make_the_pictures_of_workflows(tmp_path: Path) -> None:
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").write_text(CHECKOUT)
    wanted = graph(steps=2)
    wanted["6"]["inputs"]["text"] = "$prompt"
    (tmp_path / "graph.json").write_text(json.dumps(wanted))
    group = {
        "model": "tiny",
        "device": "cpu",
        "provider": "comfyui",
        "folder": str(tmp_path / "ComfyUI"),
        "graph": str(tmp_path / "graph.json"),
        "options": ["--cpu"],
        "min": 0,
    }
    settings = {
        "watch": {"every_s": 0.2, "timeout_s": 20.0},
        "router": {"demand_every_s": 0.2},
        "scaler": {"policy": "target_tracking", "every_s": 0.2, "drain_s": 30.0, "up_cooldown_s": 0.0},
        "elastic": [group],
    }
    with serving(settings, tmp_path) as server:
        async with server.http() as http:
            assert await http.replicas() == {}
            drawn = await http.ended(await http.submitted(DRAW))
            assert drawn["state"] == "finished", drawn
            picture = await http.get(f"/api/v1/blobs/{drawn['outputs']['sha256']}")
            rows = await http.replicas()
            (comfy,) = children(server.process.pid)
            await drain(http, "tiny-cpu-0")
            await until(http.replicas, lambda rows: rows["tiny-cpu-0"]["state"] == "gone")
            await until(lambda: _lives(comfy), lambda lives: not lives)
            again = await http.ended(await http.submitted(DRAW))
            (last,) = children(server.process.pid)
        assert server.stop() == 0
    assert picture.body.startswith(PNG)
    assert (rows["tiny-cpu-0"]["state"], rows["tiny-cpu-0"]["elastic"]) == ("ready", True)
    assert again["state"] == "finished"
    assert not alive(last)
    assert "options 127.0.0.1 True" in (server.state_dir / "logs" / "tiny-cpu-0.log").read_text()


async def drain(http: Http, replica_id: str) -> None:
    order = {"arguments": {"replica_id": replica_id, "force": True}, "dry_run": False, "reason": "test"}
    reply = await http.post("/api/v1/tools/drain_replica", json=order)
    assert reply.status == 200, reply


async def _lives(pid: int) -> bool:
    return alive(pid)

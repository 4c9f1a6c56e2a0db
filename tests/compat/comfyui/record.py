"""What a server says to a list of requests, without its words: kinds, types and shapes only.

    .venv/bin/python -m tests.compat.comfyui.record http://127.0.0.1:8188 tests/compat/comfyui/recordings/SERVER.json

The server needs the checkpoint that `scripts/tiny_checkpoint.py` makes, as `tiny.safetensors`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from swarmx.compat.comfyui.graph import Graph
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import Client, eventually

_SAID = frozenset({"type", "class_type", "status_str", "state", "input_name"})  # words of the protocol itself
_ABOUT_ERRORS = "extra_info"


def image_graph(color: int) -> Graph:
    """No model at all: an image, seen and saved."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "seen"}},
    }


def bad_graphs() -> dict[str, Any]:
    """Requests that are refused, by what is wrong with them."""
    saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}
    image = image_graph(0)["1"]

    def over(**inputs: Any) -> Graph:
        return {"1": {"class_type": "EmptyImage", "inputs": image["inputs"] | inputs}, "2": saved}

    latent = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    upscaled = {"class_type": "ImageUpscaleWithModel", "inputs": {"upscale_model": ["2", 0], "image": ["1", 0]}}
    return {
        "unknown class": {"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}},
        "no class": {"prompt": {"1": {"inputs": {}}}},
        "no prompt": {},
        "no outputs": {"prompt": {"1": image}},
        "no targets": {"prompt": image_graph(0), "partial_execution_targets": []},
        "missing input": {"prompt": {"1": {"class_type": "EmptyImage", "inputs": {"width": 64}}, "2": saved}},
        "missing input of an output": {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}},
        "not a number": {"prompt": over(width="x")},
        "too small": {"prompt": over(width=0)},
        "too large": {"prompt": over(width=1_000_000)},
        "not in the list": {"prompt": graph(model="absent.safetensors")},
        "link that is none": {
            "prompt": {"1": image, "2": {**saved, "inputs": {"images": ["1"], "filename_prefix": "x"}}}
        },
        "wrong type": {
            "prompt": {
                "1": image,
                "2": latent,
                "3": upscaled,
                "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
            }
        },
    }


async def talk(url: str, *, saved: str, seed: int) -> dict[str, Any]:
    """All conversations with one server. `saved` is an endless graph's checkpoint, `seed` one that it never saw."""
    async with aiohttp.ClientSession() as session:
        client = Client(url, session)
        said: dict[str, Any] = {"refused": {}, "runs": {}, "gets": {}}
        for name, body in bad_graphs().items():
            status, answer = await client.ask("POST", "/prompt", {"client_id": client.client_id, **body})
            said["refused"][name] = {"status": status, "body": shape(answer)}
        runs = said["runs"]
        first = graph(seed, model=saved)
        runs["first"] = await _run(client, first)
        runs["cached"] = await _run(client, first)
        runs["other seed"] = await _run(client, graph(seed + 1, model=saved))
        runs["no model"] = await _run(client, image_graph(seed % 1000))
        runs["one target"] = await _run(client, image_graph(seed % 1000 + 1), partial_execution_targets=["3"])
        outside = image_graph(seed % 1000 + 2)
        del outside["2"]
        outside["3"]["inputs"]["filename_prefix"] = "../../../../x"
        runs["failing"] = await _run(client, outside)
        runs["interrupted"] = await _interrupted(client, graph(seed + 2, model=saved, steps=2000))
        for path in ("/queue", "/prompt", "/history/none", "/object_info/NoSuch", "/object_info/KSampler", "/features",
                     "/system_stats", "/embeddings", "/models", "/models/checkpoints", "/models/none"):  # fmt: skip
            status, answer = await client.ask("GET", path)
            said["gets"][path] = {"status": status, "body": shape(answer)}
        return said


async def _run(client: Client, prompt: Graph, **more: Any) -> dict[str, Any]:
    _, events, entry = await client.run(prompt, **more)
    return _told(events, entry)


async def _interrupted(client: Client, prompt: Graph) -> dict[str, Any]:
    async with client.socket() as socket:
        _, answer = await client.submit(prompt)
        events: list[tuple[str, dict[str, Any]]] = []
        while not events or events[-1][0] != "executing" or events[-1][1]["node"] is not None:
            message = (await socket.receive(timeout=30)).json()
            events.append((message["type"], message["data"]))
            if message["type"] == "progress" and message["data"]["value"] == 1:
                await client.ask("POST", "/interrupt", {"prompt_id": answer["prompt_id"]})
    entry = await eventually(lambda: client.history(answer["prompt_id"]))
    return _told(events, entry)


def _told(events: list[tuple[str, dict[str, Any]]], entry: dict[str, Any]) -> dict[str, Any]:
    """The order of kinds without those that come as often as they like, and every kind's shapes."""
    often = ("status", "progress_state", "progress", "binary")
    order = [kind for kind, _ in events if kind not in often]
    shapes: dict[str, Any] = {}
    for kind, data in events:
        if kind != "binary":
            shapes.setdefault(kind, [])
            found = shape(data)
            if found not in shapes[kind]:
                shapes[kind].append(found)
    for found in shapes.values():
        found.sort(key=lambda row: json.dumps(row, sort_keys=True))
    return {"order": order, "shapes": shapes, "history": shape(entry)}


def shape(value: Any, key: str = "") -> Any:
    """What kind of value it is. Objects by ids have one entry, lists every kind of entry once."""
    if isinstance(value, dict):
        if key in ("prompt", "inputs", _ABOUT_ERRORS, "current_inputs"):
            return "object"
        if value and all(name.isdigit() for name in value):
            rows = [shape(row) for row in value.values()]
            return {"ID": _each(rows)}
        return {name: shape(row, name) for name, row in sorted(value.items())}
    if isinstance(value, list):
        return _each([shape(row, key if key in _SAID else "") for row in value])
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return "number"
    return value if key in _SAID or value in _KINDS else "text"


_KINDS = frozenset(
    {"execution_start", "execution_cached", "execution_success", "execution_error", "execution_interrupted"}
)


def _each(rows: list[Any]) -> list[Any]:
    unique = {json.dumps(row, sort_keys=True): row for row in rows}
    return [unique[text] for text in sorted(unique)]


def main(url: str, path: Path) -> None:
    said = asyncio.run(talk(url, saved="tiny.safetensors", seed=int(time.time())))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

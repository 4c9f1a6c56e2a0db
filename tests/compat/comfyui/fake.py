"""A ComfyUI server without ComfyUI: its protocol, as recorded, with nodes that take the time they are told to.

`recordings/` holds what a real server said to the same requests; test_fake.py compares.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import heapq
import json
import signal
import struct
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from swarmx.compat.comfyui.graph import Graph, signatures, upstream_first
from swarmx.compat.comfyui.nodes import read_spec
from swarmx.compat.comfyui.validation import Accepted, Rejected, validate
from tests.compat.comfyui.fake_nodes import object_info

PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de")


class FakeComfy:
    """One server. `step_s` is what a sampler's step takes, `load_s` a model's load. Faults are switches.

    `hangs`: requests are taken and never answered. `mute`: no events. `half_frame`: the websocket breaks off in the
    middle of the next frame. `stuck`: the job that runs makes no progress.
    """

    def __init__(
        self,
        models: tuple[str, ...] = ("tiny.safetensors",),
        *,
        step_s: float = 0.0,
        load_s: float = 0.0,
        custom: bool = False,
    ) -> None:
        self.info = object_info(list(models), custom=custom)
        self.step_s, self.load_s = step_s, load_s
        self.hangs = self.mute = self.half_frame = self.stuck = False
        self.previews = False
        self.dead = False
        self.url = ""
        self.received: list[str] = []
        """Ids of the graphs that were accepted, in their order."""
        self.files: dict[tuple[str, str], bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self._pending: list[tuple[float, int, str, Graph, dict[str, Any], list[str]]] = []
        self._running: tuple[float, int, str, Graph, dict[str, Any], list[str]] | None = None
        self._history: dict[str, Any] = {}
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._cached: dict[str, Any] = {}
        self._values: dict[str, bytes] = {}
        self._loaded: set[str] = set()
        self._number = self._saved = 0
        self._wake = asyncio.Event()
        self._interrupted = False

    async def start(self, port: int = 0) -> None:
        self._reset()
        self.dead = False
        app = web.Application(client_max_size=1 << 30, middlewares=[self._faults])
        for method, path, handler in (
            ("GET", "/ws", self._ws),
            ("POST", "/prompt", self._prompt),
            ("GET", "/prompt", self._get_prompt),
            ("GET", "/queue", self._queue),
            ("POST", "/queue", self._post_queue),
            ("GET", "/history", self._all_history),
            ("POST", "/history", self._post_history),
            ("GET", "/history/{id}", self._one_history),
            ("POST", "/interrupt", self._interrupt),
            ("POST", "/free", self._free),
            ("GET", "/object_info", self._object_info),
            ("GET", "/object_info/{name}", self._object_info),
            ("GET", "/system_stats", self._stats),
            ("GET", "/features", self._features),
            ("GET", "/embeddings", self._empty),
            ("GET", "/models", self._models),
            ("GET", "/models/{folder}", self._models),
            ("POST", "/upload/image", self._upload),
            ("POST", "/upload/mask", self._mask),
            ("GET", "/view", self._view),
        ):
            for prefix in ("", "/api"):
                (app.router.add_get if method == "GET" else app.router.add_post)(prefix + path, handler)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._worker = asyncio.create_task(self._work(), name="fake worker")

    async def die(self) -> None:
        """As by a kill: connections break, nothing is kept."""
        if self.dead:
            return
        self.dead = True
        self._worker.cancel()
        for socket in list(self._sockets.values()):
            if socket._req is not None and socket._req.transport is not None:
                socket._req.transport.abort()
        await self._runner.cleanup()
        await asyncio.gather(self._worker, return_exceptions=True)

    # HTTP

    @web.middleware
    async def _faults(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        if self.hangs:
            await asyncio.sleep(3600)
        return await handler(request)

    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        number = float(body.get("number", -self._number if body.get("front") else self._number))
        self._number += "number" not in body
        if "prompt" not in body:
            problem = {"type": "no_prompt", "message": "x", "details": "x", "extra_info": {}}
            return web.json_response({"error": problem, "node_errors": {}}, status=400)
        self._list_files()
        specs = {name: read_spec(name, info) for name, info in self.info.items()}
        names = {name for folder, name in self.files if folder == "input"}
        verdict = validate(body["prompt"], specs, targets=body.get("partial_execution_targets"), uploads=names)
        if isinstance(verdict, Rejected):
            return web.json_response(verdict.body, status=400)
        outputs, errors = _judged(body["prompt"], verdict)
        if not outputs:
            problem = {"type": "prompt_outputs_failed_validation", "message": "x", "details": "", "extra_info": {}}
            return web.json_response({"error": problem, "node_errors": errors}, status=400)
        prompt_id = str(body.get("prompt_id") or uuid.uuid4())
        extra = dict(body.get("extra_data") or {})
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        self.received.append(prompt_id)
        row = (number, len(self.received), prompt_id, body["prompt"], extra, outputs)
        heapq.heappush(self._pending, row)
        await self._status()
        self._wake.set()
        return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": errors})

    async def _get_prompt(self, request: web.Request) -> web.Response:
        return web.json_response(self._remaining())

    def _remaining(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": len(self._pending) + (self._running is not None)}}

    async def _queue(self, request: web.Request) -> web.Response:
        running = [] if self._running is None else [_row(self._running)]
        return web.json_response({"queue_running": running, "queue_pending": [_row(p) for p in self._pending]})

    async def _post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        gone = set(body.get("delete") or ())
        self._pending = [] if body.get("clear") else [p for p in self._pending if p[2] not in gone]
        heapq.heapify(self._pending)
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        wanted = (await request.json()).get("prompt_id") if request.can_read_body else None
        if self._running is not None and wanted in (None, self._running[2]):
            self._interrupted = True
        return web.Response()

    async def _free(self, request: web.Request) -> web.Response:
        self._loaded.clear()
        self._cached.clear()
        return web.Response()

    async def _all_history(self, request: web.Request) -> web.Response:
        return web.json_response(self._history)

    async def _post_history(self, request: web.Request) -> web.Response:
        for prompt_id in (await request.json()).get("delete") or ():
            self._history.pop(prompt_id, None)
        return web.Response()

    async def _one_history(self, request: web.Request) -> web.Response:
        found = self._history.get(request.match_info["id"])
        return web.json_response({} if found is None else {request.match_info["id"]: found})

    def _list_files(self) -> None:
        """The options of nodes that load files are those that are there now."""
        inputs = sorted(name for folder, name in self.files if folder == "input")
        self.info["LoadImage"]["input"]["required"]["image"][0] = inputs
        self.info["LoadLatent"]["input"]["required"]["latent"][0] = [n for n in inputs if n.endswith(".latent")]

    async def _object_info(self, request: web.Request) -> web.Response:
        self._list_files()
        name = request.match_info.get("name")
        if name is not None:
            return web.json_response({name: self.info[name]} if name in self.info else {})
        return web.json_response(self.info)

    async def _stats(self, request: web.Request) -> web.Response:
        device = {"name": "cpu", "type": "cpu", "index": None, "vram_total": 1, "vram_free": 1}
        return web.json_response({"system": {"os": "posix", "argv": ["main.py"]}, "devices": [device]})

    async def _features(self, request: web.Request) -> web.Response:
        return web.json_response({"supports_preview_metadata": True, "max_upload_size": 104857600})

    async def _empty(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def _models(self, request: web.Request) -> web.Response:
        models = self.info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
        folder = request.match_info.get("folder")
        if folder not in (None, "checkpoints"):
            return web.Response(status=404)
        return web.json_response(["checkpoints"] if folder is None else models)

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        image: Any = form["image"]
        self.files["input", image.filename] = image.file.read()
        self.uploads.append(image.filename)
        return web.json_response({"name": image.filename, "subfolder": "", "type": "input"})

    async def _mask(self, request: web.Request) -> web.Response:
        form = await request.post()
        mask: Any = form["image"]
        original = json.loads(str(form["original_ref"]))
        picture = self.files.get((original["type"], original["filename"]))
        if picture is not None:
            self.files["input", mask.filename] = picture + b" under " + mask.file.read()
        return web.json_response({"name": mask.filename, "subfolder": "", "type": "input"})

    async def _view(self, request: web.Request) -> web.Response:
        data = self.files.get((request.query.get("type", "output"), request.query["filename"]))
        if data is None:
            return web.Response(status=404)
        converted = [f" as {kind} {how}" for kind, how in request.query.items() if kind in ("channel", "preview")]
        return web.Response(body=data + "".join(converted).encode(), content_type="image/png")

    # Events

    async def _ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        self._sockets[client_id] = socket
        try:
            await self._send(client_id, "status", {"status": self._remaining(), "sid": client_id})
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT and json.loads(message.data)["type"] == "feature_flags":
                    flags = {"supports_preview_metadata": True, "max_upload_size": 104857600}
                    await self._send(client_id, "feature_flags", flags)
        finally:
            self._sockets.pop(client_id, None)  # a newer socket of the same client goes, too, as in ComfyUI
        return socket

    async def _status(self) -> None:
        for client_id in list(self._sockets):
            await self._send(client_id, "status", {"status": self._remaining()})

    async def _send(self, client_id: str | None, kind: str, data: dict[str, Any]) -> None:
        socket = self._sockets.get(client_id or "")
        if socket is None or self.mute:
            return
        try:
            if self.half_frame and kind == "progress":
                self.half_frame = False
                transport = socket._req.transport  # type: ignore[union-attr]
                transport.write(b'\x81\x7e\x04\x00{"type": "prog')  # type: ignore[union-attr]
                await asyncio.sleep(0)
                transport.close()  # type: ignore[union-attr]
                return
            await socket.send_json({"type": kind, "data": data})
        except ConnectionError:
            self._sockets.pop(client_id or "", None)

    async def _preview(self, client_id: str | None, prompt_id: str, node: str) -> None:
        socket = self._sockets.get(client_id or "")
        if socket is not None and self.previews:
            about = json.dumps({"prompt_id": prompt_id, "node_id": node, "image_type": "image/png"}).encode()
            await socket.send_bytes(struct.pack(">II", 4, len(about)) + about + PNG)

    # Running

    async def _work(self) -> None:
        while True:
            while not self._pending:
                self._wake.clear()
                await self._wake.wait()
            self._running = heapq.heappop(self._pending)
            await self._status()
            await self._execute(*self._running[2:])
            self._running = None

    async def _execute(self, prompt_id: str, prompt: Graph, extra: dict[str, Any], outputs: list[str]) -> None:
        client, messages, results = extra.get("client_id"), [], {}
        self._interrupted = False

        async def tell(kind: str, data: dict[str, Any]) -> None:
            row = {**data, "prompt_id": prompt_id, "timestamp": int(time.time() * 1000)}
            messages.append([kind, row])
            await self._send(client, kind, row)

        await tell("execution_start", {})
        names, order = signatures(prompt, outputs), upstream_first(prompt, outputs)
        cached = [node for node in order if names[node] in self._cached]
        await tell("execution_cached", {"nodes": cached})
        states: dict[str, Any] = {}
        done: list[str] = []
        success = True
        for node in order:
            output = self._cached.get(names[node])
            self._compute(node, prompt[node])
            if node in cached:
                if output:
                    results[node] = output
                    await self._executed(client, prompt_id, node, output)
                await self._progress_state(client, prompt_id, states, node, 1.0, 1.0, "finished")
                continue
            await self._progress_state(client, prompt_id, states, node, 0.0, 1.0, "running")
            where = {"node": node, "display_node": node, "prompt_id": prompt_id}
            await self._send(client, "executing", where)
            problem = await self._node(client, prompt_id, node, prompt[node], states)
            if problem == "interrupted":
                about = {"node_id": node, "node_type": prompt[node]["class_type"], "executed": done}
                await tell("execution_interrupted", about)
                success = False
                break
            if problem is not None:
                about = {
                    "node_id": node,
                    "node_type": prompt[node]["class_type"],
                    "executed": done,
                    "exception_message": problem,
                    "exception_type": "ValueError",
                    "traceback": [],
                    "current_inputs": {},
                    "current_outputs": [],
                }
                await tell("execution_error", about)
                success = False
                break
            output = self._output(node, prompt[node])
            if output is not None:
                results[node] = output
                await self._executed(client, prompt_id, node, output)
            self._cached[names[node]] = output
            done.append(node)
            await self._progress_state(client, prompt_id, states, node, 1.0, 1.0, "finished")
        self._cached = {name: out for name, out in self._cached.items() if name in set(names.values())}
        if success:
            await tell("execution_success", {})
        row = self._running
        assert row is not None
        status = {"status_str": "success" if success else "error", "completed": success, "messages": messages}
        meta = {
            node: {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node} for node in results
        }
        self._history[prompt_id] = {"prompt": _row(row), "outputs": results, "status": status, "meta": meta}
        self._running = None
        await self._status()
        await self._send(client, "executing", {"node": None, "prompt_id": prompt_id})

    async def _executed(self, client: str | None, prompt_id: str, node: str, output: Any) -> None:
        data = {"node": node, "display_node": node, "output": output, "prompt_id": prompt_id}
        await self._send(client, "executed", data)

    async def _progress_state(
        self,
        client: str | None,
        prompt_id: str,
        states: dict[str, Any],
        node: str,
        value: float,
        most: float,
        state: str,
    ) -> None:
        states[node] = {
            "value": value,
            "max": most,
            "state": state,
            "node_id": node,
            "prompt_id": prompt_id,
            "display_node_id": node,
            "parent_node_id": None,
            "real_node_id": node,
        }
        await self._send(client, "progress_state", {"prompt_id": prompt_id, "nodes": dict(states)})

    async def _node(
        self, client: str | None, prompt_id: str, node: str, row: dict[str, Any], states: Any
    ) -> str | None:
        inputs = row["inputs"]
        if row["class_type"] == "CheckpointLoaderSimple" and inputs["ckpt_name"] not in self._loaded:
            await asyncio.sleep(self.load_s)
            self._loaded.add(inputs["ckpt_name"])
        if row["class_type"] == "SaveImage" and inputs["filename_prefix"].startswith("../"):
            return "outside of the output folder"
        if row["class_type"] == "KSampler":
            order = 2 if inputs["sampler_name"] == "heun" else 1
            for step in range(1, inputs["steps"] + 1):
                while self.stuck and not self._interrupted:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(self.step_s * order)
                if self._interrupted:
                    return "interrupted"
                await self._progress_state(client, prompt_id, states, node, step, inputs["steps"], "running")
                progress = {"value": step, "max": inputs["steps"], "prompt_id": prompt_id, "node": node}
                await self._send(client, "progress", progress)
                await self._preview(client, prompt_id, node)
        return "interrupted" if self._interrupted else None

    def _compute(self, node: str, row: dict[str, Any]) -> None:
        """What a node makes of its inputs: a digest of all that went into it. A file of it is as good as itself."""
        inputs = {
            name: self._values.get(value[0], b"").hex() if isinstance(value, list) else value
            for name, value in row["inputs"].items()
        }
        made = hashlib.sha256(json.dumps([row["class_type"], inputs], sort_keys=True).encode()).digest()
        loaded = self.files.get(("input", str(row["inputs"].get("latent"))))
        self._values[node] = loaded if row["class_type"] == "LoadLatent" and loaded is not None else made

    def _output(self, node: str, row: dict[str, Any]) -> Any:
        kinds = {"SaveImage": ("output", "png"), "PreviewImage": ("temp", "png"), "SaveLatent": ("output", "latent")}
        if row["class_type"] not in kinds:
            return None
        self._saved += 1
        folder, suffix = kinds[row["class_type"]]
        *folders, stem = row["inputs"].get("filename_prefix", "temp").split("/")
        name = f"{stem}_{self._saved:05}_.{suffix}"
        source = self._values.get(row["inputs"]["samples" if suffix == "latent" else "images"][0], b"")
        self.files[folder, name] = source if suffix == "latent" else PNG + source
        return {
            f"{'latent' if suffix == 'latent' else 'image'}s": [
                {"filename": name, "subfolder": "/".join(folders), "type": folder}
            ]
        }


@asynccontextmanager
async def serving(*fakes: FakeComfy) -> AsyncIterator[None]:
    """The servers, up while the block runs."""
    for fake in fakes:
        await fake.start()
    try:
        yield
    finally:
        for fake in fakes:
            await fake.die()


def _judged(graph: Graph, verdict: Accepted) -> tuple[list[str], dict[str, Any]]:
    """The outputs that run, and what is wrong with others, once custom nodes have judged their values: none is a 7."""
    errors, outputs = dict(verdict.node_errors), []
    for output in verdict.outputs:
        above = [(node_id, graph[node_id]) for node_id in upstream_first(graph, [output])]
        picky = [n for n, node in above if node["class_type"] == "Picky" and node["inputs"]["value"] == 7]
        for node_id in picky:
            row = {"type": "custom_validation_failed", "message": "x", "details": "value", "extra_info": {}}
            about = errors.setdefault(node_id, {"errors": [row], "dependent_outputs": [], "class_type": "Picky"})
            about["dependent_outputs"].append(output)
        if not picky:
            outputs.append(output)
    return outputs, errors


def _row(job: tuple[float, int, str, Graph, dict[str, Any], list[str]]) -> list[Any]:
    number, _, prompt_id, prompt, extra, outputs = job
    return [number, prompt_id, prompt, extra, outputs]


async def main() -> None:
    """A server in a process of its own, which takes what it knows of ComfyUI's options; ends when it is told to."""
    options = argparse.ArgumentParser()
    options.add_argument("--port", type=int, default=0)
    given, _ = options.parse_known_args()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    fake = FakeComfy()
    await fake.start(given.port)
    print(json.dumps({"url": fake.url}), flush=True)
    await stop.wait()
    await fake.die()


if __name__ == "__main__":
    asyncio.run(main())

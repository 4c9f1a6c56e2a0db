"""A ComfyUI server, or a front of several, as an image replica: `python -m swarmx.providers.comfyui --help`.

Answers OpenAI's image request, which `image` nodes of workflows make, by running a graph. The graph is a ComfyUI export
in API format in which the text inputs `$prompt`, `$width`, `$height`, `$steps`, `$seed` and `$n` stand for the request.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import secrets
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec
from aiohttp import web

from swarmx.core.errors import ConfigError

TOKEN = "SWARMX_COMFYUI_TOKEN"  # noqa: S105  # the name of the variable that holds it
PLACES = ("$prompt", "$width", "$height", "$steps", "$seed", "$n")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
# How soon a job is asked for again: the least and the most seconds, and the share of what it has taken by then.
_POLL = (0.2, 2.0, 0.05)
_QUEUE = (1.0, 15.0, 0.25)  # for the whole queue, which may be long
_MOST_IMAGES, _MOST_STEPS = 16, 10_000
_GIVEN_UP_AFTER = 25  # polls in a row without an answer
_LOOKS = 3  # at which a job has to be nowhere: it moves between two of them


class Template:
    """A graph with places for what a request says. Raises ConfigError for a file that is none."""

    def __init__(self, path: Path) -> None:
        try:
            self._raw = path.read_bytes()
            graph = msgspec.json.decode(self._raw, type=dict[str, dict[str, Any]])
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{path} is not a graph in API format: {error}.") from None
        self._places = {
            (node_id, name): value
            for node_id, node in graph.items()
            for name, value in node.get("inputs", {}).items()
            if value in PLACES
        }
        if "$prompt" not in self._places.values():
            raise ConfigError(f'{path} has no input "$prompt": put it where the text of the request belongs.')

    def filled(self, values: dict[str, object]) -> dict[str, Any]:
        """The graph of one request."""
        graph: dict[str, Any] = msgspec.json.decode(self._raw)
        for node in graph.values():
            inputs = node.get("inputs", {})
            for name, value in inputs.items():
                if isinstance(value, str) and value in values:
                    inputs[name] = values[value]
        return graph

    def place(self, node_id: str, name: str | None) -> str | None:
        """What of a request stands in an input of a node; None for what is the graph's own."""
        return self._places.get((node_id, name or ""))


class ImageReplica:
    """Runs one graph a request, and waits for it by polling. `token` is for a front that wants one."""

    def __init__(self, *, url: str, model: str, template: Template, token: str | None) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._template = template
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None
        self._running = 0

    def app(self) -> web.Application:
        """The routes of a replica: the request, and what the watch and people ask."""
        app = web.Application(client_max_size=1 << 20)
        app.cleanup_ctx.append(self._connected)
        app.router.add_post("/v1/images/generations", self.generate)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/health", self.health)
        return app

    async def generate(self, request: web.Request) -> web.Response:
        """POST /v1/images/generations."""
        try:
            values = self._values(msgspec.json.decode(await request.read()))
        except (ValueError, RecursionError) as error:
            return _error(400, str(error))
        prompt_id = str(uuid.uuid4())
        self._running += 1
        ended = False
        try:
            status, answer = await self._ask(
                "POST", "/prompt", {"prompt": self._template.filled(values), "prompt_id": prompt_id}
            )
            if status != 200:
                ended = True
                return self._refused(status, answer)
            prompt_id = answer["prompt_id"]
            entry = await self._end(prompt_id)
            ended = True
            if entry["status"]["status_str"] != "success":
                return _error(502, "the graph did not run to its end")
            files = [file for output in entry["outputs"].values() for file in output.get("images", ())]
            kept = [file for file in files if file.get("type") == "output"] or files
            pictures = [await self._picture(file) for file in kept]
        except (aiohttp.ClientError, OSError, TimeoutError, KeyError, TypeError) as error:
            return _error(502, f"ComfyUI did not answer as expected: {error!r}")
        finally:
            self._running -= 1
            if not ended:
                await asyncio.shield(self._stop(prompt_id))
        data = [{"b64_json": base64.b64encode(picture).decode()} for picture in pictures]
        return web.json_response({"created": int(time.time()), "data": data})

    def _refused(self, status: int, answer: Any) -> web.Response:
        """The server takes no such graph. That is the request's fault where all that is wrong came from it: another
        replica would say the same."""
        problem = answer.get("error") if isinstance(answer, dict) else None
        reason = f"ComfyUI refused the graph: {problem.get('message') if isinstance(problem, dict) else problem}"
        if status != 400:
            return _error(429 if status == 429 else 502, reason)
        found = [
            (self._template.place(node_id, (row.get("extra_info") or {}).get("input_name")), row["message"])
            for node_id, node in (answer.get("node_errors") or {}).items()
            for row in node["errors"]
        ]
        wrong = sorted({f"{place[1:]}: {message}" for place, message in found if place is not None})
        if not wrong or any(place is None for place, _ in found):
            return _error(502, reason)
        return _error(400, f"ComfyUI does not take what the request asks for: {'; '.join(wrong)}")

    async def metrics(self, request: web.Request) -> web.Response:
        """What runs through this replica, under the names that the watch reads."""
        text = f"vllm:num_requests_running {self._running}\nvllm:num_requests_waiting 0\n"
        return web.Response(text=text)

    async def health(self, request: web.Request) -> web.Response:
        try:
            status, _ = await self._ask("GET", "/queue")
        except (aiohttp.ClientError, OSError, TimeoutError):
            status = 503
        return web.Response(status=200 if status == 200 else 503)

    def _values(self, body: Any) -> dict[str, object]:
        """What the places stand for. Raises ValueError."""
        if not isinstance(body, dict) or not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise ValueError("`prompt` must be a text that is not empty")
        if body.get("model") != self._model:
            raise ValueError(f"the model is {self._model!r} here, not {body.get('model')!r}")
        size = _SIZE.fullmatch(str(body.get("size") or "1024x1024"))
        if size is None:
            raise ValueError(f"size is {body['size']!r}, expected WxH such as 1024x1024")
        numbers = {"n": (body.get("n") or 1, _MOST_IMAGES), "steps": (body.get("steps") or 30, _MOST_STEPS)}
        for name, (value, most) in numbers.items():
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}, expected a whole number from 1 to {most}")
        seed = body.get("seed")
        return {
            "$prompt": body["prompt"],
            "$width": int(size[1]),
            "$height": int(size[2]),
            "$steps": numbers["steps"][0],
            "$n": numbers["n"][0],
            "$seed": seed if type(seed) is int and 0 <= seed < 1 << 63 else secrets.randbelow(1 << 48),
        }

    async def _end(self, prompt_id: str) -> dict[str, Any]:
        """What became of the job. The longer it takes, the less often the server is asked, least for its whole queue.
        Raises KeyError for one that the server has forgotten."""
        began_s, queue_s = time.monotonic(), _QUEUE[0]
        failures = nowhere = 0
        while True:
            taken_s = time.monotonic() - began_s
            try:
                _, found = await self._ask("GET", f"/history/{prompt_id}")
                if prompt_id in (found or {}):
                    return found[prompt_id]  # type: ignore[no-any-return]
                if nowhere or taken_s >= queue_s:
                    nowhere = 0 if await self._is_queued(prompt_id) else nowhere + 1
                    queue_s = taken_s + _pause_s(_QUEUE, taken_s)
                if nowhere >= _LOOKS:
                    raise KeyError(f"the job {prompt_id} is not there any more")
                failures = 0
            except (aiohttp.ClientError, OSError, TimeoutError):
                failures += 1
                if failures >= _GIVEN_UP_AFTER:
                    raise
            await asyncio.sleep(_POLL[0] if failures or nowhere else _pause_s(_POLL, taken_s))

    async def _picture(self, file: dict[str, Any]) -> bytes:
        query = {"filename": file["filename"], "subfolder": file.get("subfolder", ""), "type": file["type"]}
        async with self._http.get(f"{self._url}/view", params=query, headers=self._headers) as response:
            response.raise_for_status()
            return await response.read()

    async def _stop(self, prompt_id: str) -> None:
        """Nobody waits for the job any more."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            await self._ask("POST", "/queue", {"delete": [prompt_id]})
            if await self._is_queued(prompt_id):  # older servers interrupt whatever runs
                await self._ask("POST", "/interrupt", {"prompt_id": prompt_id})

    async def _is_queued(self, prompt_id: str) -> bool:
        """Whether the job runs or waits. Newer servers and fronts are asked for it alone, not for their whole queue."""
        status, found = await self._ask("GET", f"/api/jobs/{prompt_id}")
        if status == 200 and isinstance(found, dict) and found.get("status") in ("pending", "in_progress"):
            return True
        status, found = await self._ask("GET", "/queue")
        if status != 200 or not isinstance(found, dict):
            raise OSError(f"the queue was answered with status {status}")
        rows = [*(found.get("queue_running") or ()), *(found.get("queue_pending") or ())]
        return any(prompt_id in row[:2] for row in rows)

    async def _ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        async with self._http.request(method, self._url + path, json=body, headers=self._headers) as response:
            raw = await response.read()
            try:
                return response.status, msgspec.json.decode(raw) if raw else None
            except msgspec.MsgspecError:
                return response.status, None

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the app runs"  # noqa: S101
        return self._session

    async def _connected(self, app: web.Application) -> Any:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0)) as self._session:
            yield


def _pause_s(bounds: tuple[float, float, float], taken_s: float) -> float:
    least_s, most_s, share = bounds
    return min(max(least_s, share * taken_s), most_s)


def _error(status: int, message: str) -> web.Response:
    kind = "invalid_request_error" if status == 400 else "server_error"
    return web.json_response({"error": {"message": message, "type": kind, "param": None, "code": None}}, status=status)


@click.command()
@click.option("--url", required=True, help="The ComfyUI server, or the front of `swarmx comfy`.")
@click.option("--graph", "graph", required=True, type=click.Path(path_type=Path), help="Graph in API format.")
@click.option("--model", required=True, help="Model name, as clients ask for it.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Loopback port; 0 (default) picks one.")
@click.option("--exit-with-parent", is_flag=True, help="Exit when stdin ends.")
def main(url: str, graph: Path, model: str, port: int, exit_with_parent: bool) -> None:
    """Serve a graph as an image model on loopback and print {"port": N}.

    A front that wants a key gets the one in SWARMX_COMFYUI_TOKEN.
    """
    try:
        template = Template(graph)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    replica = ImageReplica(url=url, model=model, template=template, token=os.environ.pop(TOKEN, None))
    asyncio.run(_serve(replica, port, exit_with_parent=exit_with_parent))


@contextlib.asynccontextmanager
async def served(replica: ImageReplica, port: int = 0) -> AsyncIterator[int]:
    """The replica on loopback; gives its port. A request whose caller hangs up ends, and its job with it."""
    runner = web.AppRunner(replica.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def _serve(replica: ImageReplica, port: int, *, exit_with_parent: bool) -> None:
    stop = asyncio.Event()

    def read() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            stop.set()

    if exit_with_parent:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), read)
    async with served(replica, port) as found:
        click.echo(json.dumps({"port": found}))
        await stop.wait()


if __name__ == "__main__":
    main()

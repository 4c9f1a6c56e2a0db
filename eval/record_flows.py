"""Run the demo's workflows on real small models and record what every step of them came to, for the emulator to replay.

`eval.record_lengths` records single tasks. Here the workflow engine itself runs, so that fan-out, review rounds and
drafts are those of a real model that read a real model's plan and code: a later step's prompt begins with a paragraph
that the emulator meets again. Images are not made (they have no text); their node gets an empty picture.

    python -m eval.record_flows --small URL=NAME --large URL=NAME --small-label qwen2.5-coder-0.5b-instruct \
        --large-label qwen2.5-coder-1.5b-instruct --per-kind 24 --out swarmx/providers/emulated/recorded/flows.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import Progress

from eval.record_lengths import Record
from swarmx.core.failures import Failure
from swarmx.core.prompt_key import prompt_key
from swarmx.core.records import ModelRequest, ModelResult
from swarmx.demo.corpus import KINDS, Task, flow, openers, roles
from swarmx.memory.sqlite import SqliteStore
from swarmx.runtime.clock import WallClock
from swarmx.runtime.workflows import WorkflowRunner
from swarmx.workflows.spec import parse_workflow

_MODELS = {"small": "small", "large": "large", "image": "image"}


class RecordingCaller:
    """Implements `core.ports.Caller` on one server a model size, and writes a record of every answer."""

    def __init__(self, session: aiohttp.ClientSession, servers: dict[str, tuple[str, str, str]], out: Path) -> None:
        self._session = session
        self._servers = servers
        self._sink = out.open("ab", buffering=0)
        self._slots = asyncio.Semaphore(64)
        self.counts: Counter[str] = Counter()

    async def complete(self, request: ModelRequest) -> ModelResult:
        if request.kind == "image":
            picture = {"data": [{"b64_json": base64.b64encode(_blank_png()).decode()}]}
            return ModelResult(call_id="image", replica_id=None, attempts=1, answer=picture)
        url, name, label = self._servers[request.model]
        async with self._slots:
            body = {**request.body, "model": name, "seed": 0}
            async with self._session.post(f"{url}/v1/chat/completions", json=body) as response:
                answer: dict[str, Any] = await response.json()
        if "choices" not in answer:
            failure = Failure(cause="replica", error=str(answer)[:300])
            return ModelResult(call_id="", replica_id=None, attempts=1, failure=failure)
        self._sink.write(msgspec.json.encode(_record(request, answer, label)) + b"\n")
        self.counts[request.role] += 1
        return ModelResult(call_id="call", replica_id=label, attempts=1, answer=answer)


def _record(request: ModelRequest, answer: dict[str, Any], label: str) -> Record:
    texts = {message["role"]: message["content"] for message in request.body["messages"]}
    choice, usage = answer["choices"][0], answer["usage"]
    reply = None
    if roles()[request.role]["schema"] is not None and choice["finish_reason"] != "length":
        reply = msgspec.json.decode(choice["message"]["content"])
    return Record(
        key=prompt_key(texts.get("system", ""), texts["user"]),
        system_key=prompt_key(texts.get("system", ""), ""),
        task_id=f"{request.workflow_kind}:{request.node}",
        role=request.role,
        difficulty="",
        model=label,
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        finish_reason=choice["finish_reason"],
        reply=reply,
    )


def _blank_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)

    header = (1).to_bytes(4) + (1).to_bytes(4) + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


async def _run(args: argparse.Namespace, console: Console) -> int:
    servers = {
        size: (*getattr(args, size).split("=", 1), getattr(args, f"{size}_label")) for size in ("small", "large")
    }
    todo: list[tuple[str, Task]] = [
        (kind, openers(kind)[i]) for i in range(args.per_kind) for kind in KINDS if i < len(openers(kind))
    ]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1800)) as session:
        store = SqliteStore(":memory:")
        await store.open()
        caller = RecordingCaller(session, servers, args.out)
        runner = WorkflowRunner(store, caller, WallClock())
        failed = 0
        with Progress(console=console) as progress:
            line = progress.add_task("workflows", total=len(todo))
            waiting = iter(todo)

            async def stream() -> None:
                nonlocal failed
                for kind, task in waiting:
                    workflow_id = await runner.submit(parse_workflow(flow(kind, task, _MODELS)), {}, "record")
                    record = await runner.wait(workflow_id, None)
                    if record.state != "finished":
                        failed += 1
                        console.print(f"{task.id}: {record.state} {record.outcome!r:.300}", markup=False)
                    progress.advance(line)

            await asyncio.gather(*(stream() for _ in range(args.concurrency)))
        await runner.close()
        await store.close()
    console.print(f"{len(todo) - failed} workflows finished, {failed} did not; answers by role: {dict(caller.counts)}")
    return 1 if failed else 0


def main() -> int:
    """Run the recorder; 1 when a workflow did not finish."""
    parser = argparse.ArgumentParser(prog="python -m eval.record_flows", description=(__doc__ or "").split("\n")[0])
    for size in ("small", "large"):
        parser.add_argument(f"--{size}", required=True, metavar="URL=NAME", help=f"server and name of the {size} model")
        parser.add_argument(f"--{size}-label", required=True, help="its name in the recording")
    parser.add_argument("--per-kind", type=int, default=24, help="workflows of each kind (default: 24)")
    parser.add_argument("--concurrency", type=int, default=6, help="workflows at a time (default: 6)")
    parser.add_argument("--out", type=Path, required=True, help="recording to append to")
    return asyncio.run(_run(parser.parse_args(), Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())

"""What SwarmX adds to a call: time and CPU of the gateway against going to the replica directly; start-up and memory.

The replica is a real HTTP server in a process of its own that answers at once with a fixed chat completion, so that the
difference is the gateway. All paths are measured in turns, in one run, over the same kept-alive connection; one of them
is that of a program that names its session, whose calls become a workflow.

    python -m eval.overhead --out DIR [--calls 1500] [--bytes 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
from aiohttp import web
from rich.console import Console

from eval.result import Row, write_result
from swarmx.demo.fleet import server

_TICKS = os.sysconf("SC_CLK_TCK")
_MODEL = "fixed"
_TURN = 50  # calls of a path in a row
_ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": _MODEL,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 50}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 500, "completion_tokens": 50, "total_tokens": 550},
}


def _fixed_replica() -> None:
    """Serve the fixed answer until the parent goes away; prints its port."""
    body = json.dumps(_ANSWER).encode()

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="")

    async def main() -> None:
        app = web.Application(client_max_size=1 << 24)
        app.add_routes([web.post("/v1/chat/completions", answer), web.get("/metrics", metrics)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    asyncio.run(main())


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def _timed(session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]) -> float:
    start = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as response:
        await response.read()
        assert response.status == 200, await response.text()
    return time.perf_counter() - start


async def _measure(args: argparse.Namespace) -> list[Row]:
    replica = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "eval.overhead", "--replica"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert replica.stdout is not None
    direct = f"http://127.0.0.1:{int(await replica.stdout.readline())}"
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"replicas": [{"id": "fixed", "model": _MODEL, "url": direct}]}
            began = time.perf_counter()
            async with server(settings, Path(folder)) as api:
                started_s = time.perf_counter() - began
                pid = _pid_listening(api.url)
                rows.append(
                    {"experiment": "startup", "ready_s": started_s, "rss_mib": _rss_mib(pid), "cpu_s": _cpu_s(pid)}
                )
                token = (Path(folder) / "state" / "admin.token").read_text()
                for size in args.bytes:
                    rows += await _paths(api.url, direct, token, pid, size, args.calls)
                rows.append({"experiment": "after_load", "rss_mib": _rss_mib(pid)})
    finally:
        assert replica.stdin is not None
        replica.stdin.close()
        await replica.wait()
    return rows


async def _paths(gateway: str, direct: str, token: str, pid: int, size: int, calls: int) -> list[Row]:
    """The same call directly, through the gateway, and there with the header of a program, a session every 50 calls."""
    body = json.dumps(
        {"model": _MODEL, "messages": [{"role": "user", "content": "x" * size}], "max_tokens": 64}
    ).encode()
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    times: dict[str, list[float]] = {"direct": [], "gateway": [], "program": []}
    cpu_s = dict.fromkeys(times, 0.0)
    async with aiohttp.ClientSession() as session:
        for turn in range(calls // _TURN + 1):
            named = {**headers, "x-session-id": f"{size}-{turn}"}
            for path, url, sent in (
                ("direct", direct, headers), ("gateway", gateway, headers), ("program", gateway, named)
            ):  # fmt: skip
                before_s = _cpu_s(pid)
                taken = [await _timed(session, url, body, sent) for _ in range(_TURN)]
                if turn > 0:  # the first turn warms up
                    times[path] += taken
                    cpu_s[path] += _cpu_s(pid) - before_s
    p50 = {path: float(np.percentile(values, 50)) for path, values in times.items()}
    p99 = {path: float(np.percentile(values, 99)) for path, values in times.items()}
    cpu_us = {path: cpu_s[path] / len(values) * 1e6 for path, values in times.items()}
    return [
        {
            "experiment": "overhead",
            "prompt_bytes": size,
            "n": len(times["gateway"]),
            "direct_p50_ms": p50["direct"] * 1e3,
            "gateway_p50_ms": p50["gateway"] * 1e3,
            "added_p50_ms": (p50["gateway"] - p50["direct"]) * 1e3,
            "direct_p99_ms": p99["direct"] * 1e3,
            "gateway_p99_ms": p99["gateway"] * 1e3,
            "cpu_us_per_request": cpu_us["gateway"],
            "program_p50_ms": p50["program"] * 1e3,
            "program_p99_ms": p99["program"] * 1e3,
            "program_cpu_us_per_request": cpu_us["program"],
        }
    ]


def _pid_listening(url: str) -> int:
    """The process that owns the listening socket of a loopback port."""
    port = int(url.rsplit(":", 1)[1])
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    }
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue
        if any(f"socket:[{inode}]" in links for inode in inodes):
            return int(process.name)
    raise RuntimeError(f"nobody listens on port {port}")


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--replica", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=1500, help="measured calls a path and size (default: 1500)")
    parser.add_argument("--bytes", type=int, nargs="+", default=[2_000, 50_000, 1_000_000], help="prompt sizes")
    parser.add_argument("--out", type=Path, default=Path("out/overhead"))
    args = parser.parse_args()
    if args.replica:
        _fixed_replica()
        return
    rows = asyncio.run(_measure(args))
    write_result(args.out, "python -m eval.overhead", rows, claims=[], seeds=[])
    Console().print((args.out / "result.md").read_text(), markup=False)


if __name__ == "__main__":
    main()

"""How well are seconds of image graphs known ahead? `record` runs random graphs on a real ComfyUI, `score` judges.

`intervals` chooses how errors of earlier graphs count for the spread of a forecast, on one half of the graphs, which
their hash picks, and judges what it chose on the other.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import numpy as np

from eval.result import Row, Value, claim, table, write_result
from swarmx.neural.heads.comfy_graph import graph_key
from swarmx.neural.heads.comfy_nodes import NodeWork, node_works
from swarmx.neural.node_costs import NodeCosts

_AIM = 0.15
_SAMPLERS = (
    "euler", "heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "dpmpp_2s_ancestral", "lcm", "uni_pc", "euler_ancestral",
)  # fmt: skip
_SIDES = (64, 128, 192, 256, 320, 384)
_ORDERS, _FIRST = 10, 8  # of the graphs; and how many of each are not judged
_FADES, _LEARNINGS = (0.9, 0.95, 0.98, 1.0), (0.0, 1.0, 2.0, 3.0)
_KEPT = ((0.98, 2.0), (0.95, 0.0))  # what forecasts do, and did before


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """A graph that ran, and the seconds of each node that did: by the clock, and of CPU of the server's process."""

    graph: dict[str, Any]
    wall_s: dict[str, float]
    cpu_s: dict[str, float]


def random_graph(rng: np.random.Generator, checkpoints: Sequence[str]) -> dict[str, Any]:
    """Text to image; a third has a second pass on a larger latent, a third ends in an upscaled picture."""

    def node(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": name, "inputs": inputs}

    def sampler(latent: str, denoise: float) -> dict[str, Any]:
        return node(
            "KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=[latent, 0],
            seed=int(rng.integers(2**31)), steps=int(rng.integers(2, 31)), cfg=float(rng.choice([1.0, 5.0, 7.0])),
            sampler_name=str(rng.choice(_SAMPLERS)), scheduler="normal", denoise=denoise,
        )  # fmt: skip

    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name=str(rng.choice(list(checkpoints)))),
        "2": node("CLIPTextEncode", clip=["1", 1], text=f"a lighthouse at night, number {rng.integers(1000)}"),
        "3": node("CLIPTextEncode", clip=["1", 1], text="blurred"),
        "4": node(
            "EmptyLatentImage", width=int(rng.choice(_SIDES)), height=int(rng.choice(_SIDES)),
            batch_size=int(rng.choice([1, 1, 1, 2, 4])),
        ),
        "5": sampler("4", 1.0),
    }  # fmt: skip
    latent = "5"
    if rng.random() < 1 / 3:
        graph["6"] = node("LatentUpscaleBy", samples=["5", 0], upscale_method="nearest-exact", scale_by=1.5)
        graph["7"] = sampler("6", float(rng.choice([0.3, 0.5, 0.7])))
        latent = "7"
    graph["8"] = node("VAEDecode", samples=[latent, 0], vae=["1", 2])
    image = "8"
    if rng.random() < 1 / 3:
        graph["9"] = node("ImageScaleBy", image=["8", 0], upscale_method="bicubic", scale_by=2.0)
        image = "9"
    graph["10"] = node("SaveImage", images=[image, 0], filename_prefix="cost")
    return graph


async def record(url: str, pid: int, graphs: int, seed: int, path: Path) -> None:
    """Run random graphs one after the other; what nodes took goes to `path`, a graph a line.

    Of a server with one thread of computation, CPU seconds are what a quiet machine would take.
    """
    rng, client = np.random.default_rng(seed), uuid4().hex
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/models/checkpoints") as answer:
            checkpoints = sorted(await answer.json())
        async with session.ws_connect(f"{url}/ws?clientId={client}", max_msg_size=0) as socket:
            with path.open("ab") as out:
                for number in range(graphs):
                    ran = await _run(session, socket, url, client, pid, random_graph(rng, checkpoints))
                    out.write(msgspec.json.encode(ran) + b"\n")
                    out.flush()
                    print(f"\r{number + 1} of {graphs}", end="", file=sys.stderr)


async def _run(
    session: aiohttp.ClientSession,
    socket: aiohttp.ClientWebSocketResponse,
    url: str,
    client: str,
    pid: int,
    graph: dict[str, Any],
) -> Ran:
    async with session.post(f"{url}/prompt", json={"prompt": graph, "client_id": client}) as answer:
        body = await answer.json()
        if answer.status != 200:
            raise SystemExit(f"the server refused a graph: {body}")
    loop = asyncio.get_running_loop()
    wall_s: dict[str, float] = {}
    cpu_s: dict[str, float] = {}
    node, at_s, at_cpu_s = None, 0.0, 0.0
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue
        event = message.json()
        if event["type"] == "execution_error":
            raise SystemExit(f"a graph failed: {event['data'].get('exception_message')}")
        if event["type"] != "executing" or event["data"].get("prompt_id") != body["prompt_id"]:
            continue
        now_s, now_cpu_s = loop.time(), await asyncio.to_thread(cpu_seconds, pid)
        if node is not None:
            wall_s[node], cpu_s[node] = now_s - at_s, now_cpu_s - at_cpu_s
        node, at_s, at_cpu_s = event["data"]["node"], now_s, now_cpu_s
        if node is None:
            break
    return Ran(graph=graph, wall_s=wall_s, cpu_s=cpu_s)


def cpu_seconds(pid: int) -> float:
    """CPU seconds of all threads of a process (Linux)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total / 1e9


def score(runs: Sequence[Ran], clock: str, held_out: float = 1 / 3) -> list[Row]:
    """Errors of whole graphs that were held out, after learning from the others in their order; and of simpler ways."""
    learn = runs[: round(len(runs) * (1 - held_out))]
    judged = runs[len(learn) :]
    costs = NodeCosts()
    for ran in learn:
        works, seconds = node_works(ran.graph), _seconds(ran, clock)
        expected_s = sum(costs.seconds("server", works[node]) for node in seconds)
        for node, took_s in seconds.items():
            costs.observe("server", works[node], took_s)
        costs.observe_graph("server", expected_s, sum(seconds.values()))
    took = np.array([sum(_seconds(ran, clock).values()) for ran in judged])
    before = np.array([sum(_seconds(ran, clock).values()) for ran in learn])
    forecasts = [costs.forecast("server", [node_works(ran.graph)[node] for node in ran.wall_s]) for ran in judged]
    inside = np.mean([f.quantiles[0] <= t <= f.quantiles[-2] for f, t in zip(forecasts, took, strict=True)])
    ways: Mapping[str, Any] = {
        "median of all graphs": np.full(len(took), np.median(before)),
        "steps x pixels": _fitted(learn, before, judged, lambda w: w[1] / max(w[0], 1.0)),
        "evaluations x pixels": _fitted(learn, before, judged, lambda w: w[1]),
        "nodes (ours)": np.array([f.quantile(0.5) for f in forecasts]),
    }
    rows: list[Row] = []
    for name, guess in ways.items():
        off = np.abs(guess - took) / took
        rows.append(
            {
                "way": name, "clock": clock, "learnt_from": len(learn), "judged": len(judged),
                "median_error": float(np.median(off)), "mean_error": float(off.mean()),
                "p90_error": float(np.quantile(off, 0.9)),
                "inside_p5_p95": float(inside) if name == "nodes (ours)" else None,
            }
        )  # fmt: skip
    return rows


def halves(runs: Sequence[Ran]) -> tuple[list[Ran], list[Ran]]:
    """To choose on, and to judge on: by a hash of what a graph costs."""
    odd = [int(graph_key(ran.graph), 16) % 2 for ran in runs]
    return [ran for ran, side in zip(runs, odd, strict=True) if not side], [
        ran for ran, side in zip(runs, odd, strict=True) if side
    ]


def interval_row(runs: Sequence[Ran], clock: str, fade: float, learning: float) -> dict[str, Value]:
    """Graphs in several orders, each forecast from those before it: what was inside of P5 to P95, how wide that is in
    logarithms, and the mean loss of all quantiles there (the lower the better, for sharp and for honest ones)."""
    inside, width, loss = [], [], []
    for order in range(_ORDERS):
        costs = NodeCosts(fade=fade, learning=learning)
        for number, index in enumerate(np.random.default_rng(order).permutation(len(runs))):
            works, seconds = node_works(runs[index].graph), _seconds(runs[index], clock)
            took_s, nodes = sum(seconds.values()), [works[node] for node in seconds]
            forecast = costs.forecast("server", nodes)
            if number >= _FIRST:
                quantiles, levels = np.log(forecast.quantiles), np.array(forecast.levels)
                off = math.log(took_s) - quantiles
                inside.append(bool(forecast.quantile(0.05) <= took_s <= forecast.quantile(0.95)))
                width.append(math.log(forecast.quantile(0.95) / forecast.quantile(0.05)))
                loss.append(float(np.mean(np.maximum(levels * off, (levels - 1.0) * off))))
            expected_s = sum(costs.seconds("server", work) for work in nodes)
            for work, each_s in zip(nodes, seconds.values(), strict=True):
                costs.observe("server", work, each_s)
            costs.observe_graph("server", expected_s, took_s)
    return {
        "clock": clock, "fade": fade, "learning": learning, "graphs": len(runs),
        "inside_p5_p95": float(np.mean(inside)), "width": float(np.median(width)), "loss": float(np.mean(loss)),
    }  # fmt: skip


def intervals(runs: Sequence[Ran], clock: str) -> list[Row]:
    """Every way on the half to choose on; then the best of them and the plain fade on the half to judge on."""
    choose, judge = halves(runs)
    tried = [interval_row(choose, clock, fade, learning) for fade in _FADES for learning in _LEARNINGS]
    best = min(tried, key=lambda row: float(row["loss"] or 0.0))
    ways = ((float(best["fade"] or 0.0), float(best["learning"] or 0.0)), *_KEPT)
    return [
        *({"half": "choose", **row} for row in tried),
        *({"half": "judge", **interval_row(judge, clock, *way)} for way in dict.fromkeys(ways)),
    ]


def _fitted(learn: Sequence[Ran], took: Any, judged: Sequence[Ran], amount: Any) -> Any:
    """Seconds as a constant, so much for an amount of the samplers, and so much for the pixels that are decoded."""

    def table_of(runs: Sequence[Ran]) -> Any:
        rows = []
        for ran in runs:
            works: dict[str, NodeWork] = node_works(ran.graph)
            samplers = [work.amounts for work in works.values() if len(work.amounts) == 3]
            rows.append((1.0, sum(map(amount, samplers)), works["8"].amounts[0]))
        return np.array(rows)

    weights = 1.0 / took
    found = np.linalg.lstsq(table_of(learn) * weights[:, None], took * weights, rcond=None)[0]
    return np.maximum(table_of(judged) @ found, 1e-3)


def _seconds(ran: Ran, clock: str) -> dict[str, float]:
    return ran.cpu_s if clock == "cpu" else ran.wall_s


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, or score what was recorded; 0 when the aim is met."""
    parser = argparse.ArgumentParser(prog="python -m eval image_costs", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    run = ways.add_parser("record")
    run.add_argument("--url", required=True, help="a ComfyUI server on this machine")
    run.add_argument("--pid", type=int, required=True, help="its process, for CPU seconds")
    run.add_argument("--graphs", type=int, default=240)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, required=True, help="file of JSON lines, appended to")
    judge = ways.add_parser("score")
    spread = ways.add_parser("intervals")
    for way in (judge, spread):
        way.add_argument("runs", type=Path, help="what `record` wrote")
        way.add_argument("--out", type=Path, required=True, help="folder for the result")
    given = parser.parse_args(arguments)
    if given.way == "record":
        asyncio.run(record(given.url, given.pid, given.graphs, given.seed, given.out))
        return 0
    runs = [msgspec.json.decode(line, type=Ran) for line in given.runs.read_bytes().splitlines()]
    judged = score if given.way == "score" else intervals
    rows = [row for clock in ("cpu", "wall") for row in judged(runs, clock)]
    claims = []
    if given.way == "score":
        ours = next(row for row in rows if row["way"] == "nodes (ours)")
        claims.append(claim("median_error", float(ours["median_error"] or 0.0), "<=", _AIM))
    command = " ".join(["python -m eval image_costs", *(sys.argv[1:] if arguments is None else arguments)])
    print(table(rows))
    print(write_result(given.out, command, rows, claims, seeds=[0], data_files=[given.runs]))
    return 0 if all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())

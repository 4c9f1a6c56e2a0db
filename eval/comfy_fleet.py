"""What are forecasts worth to a fleet of ComfyUI servers? Emulated: four serial servers of unequal speed, virtual time.

Graphs are drawn from a few templates, as sessions of clients that change a seed, a prompt, the size or the end of their
graph. Costs of nodes are round figures of the kind that GPUs have, with noise, and one node whose time its inputs do
not tell. The front's scheduler learns from nothing, in the run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.comfy_virtual import BASELINES, WAYS, Ours, Server, VirtualJob, World, simulate
from eval.result import Claim, Row, claim, table, write_result
from swarmx.compat.comfyui.forecasts import JobFacts, NodeFacts
from swarmx.compat.comfyui.graph import Graph
from swarmx.neural.heads.comfy_nodes import NodeWork

SPEEDS: Mapping[str, float] = {"one": 1.0, "two": 0.7, "three": 0.45, "four": 0.25}
LOADS = (0.7, 0.85)
WARM_UP, JOBS = 100, 600
_SEEDS = 3
_SESSIONS = 12
_MODELS = {"one.safetensors": 1.0, "two.safetensors": 1.6, "three.safetensors": 2.5}  # and how large they are
_STEPS, _SIDES, _BATCHES = (4, 8, 12, 20, 20, 25, 30, 50), (512, 768, 1024), (1, 1, 1, 2, 4)
_IN_MEMORY = 2  # checkpoints that the memory of a server holds
_COLD_S, _HELD_S = 4.0, 0.8  # a load from disk, and from memory, of the smallest
_EVALUATION_S, _DECODE_S, _UPSCALE_S, _SAVE_S, _DETAIL_S, _OTHER_S, _REST_S = 0.05, 0.3, 0.5, 0.08, 2.5, 0.02, 0.05
_NOISE = 0.08
_FOUND = 1.2  # faces in a picture
_OUTPUT = ("9",)


def _node_s(node: NodeFacts, speed: float, in_memory: Mapping[str, None]) -> float:
    """What a node takes: disks differ less than GPUs."""
    if node.loads:
        return sum(_MODELS[m] * (_HELD_S if m in in_memory else _COLD_S) for m in node.loads) / math.sqrt(speed)
    return _rule_s(node.work) / speed


def _rule_s(work: NodeWork) -> float:
    """Seconds of a node on a server of speed 1."""
    match work.class_type:
        case "ksampler":
            return _EVALUATION_S * _MODELS[work.model] * (0.2 * work.amounts[0] + work.amounts[1])
        case "vaedecode":
            return _DECODE_S * work.amounts[0]
        case "imagescaleby":
            return _UPSCALE_S * work.amounts[0]
        case "saveimage":
            return _SAVE_S * work.amounts[0]
        case "facedetailer":
            return _DETAIL_S
        case _:
            return _OTHER_S


WORLD = World(speeds=SPEEDS, models=_IN_MEMORY, node_s=_node_s, rest_s=_REST_S)


class Sessions:
    """Clients that work on a graph each: most jobs are near the session's last one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._states = [self._fresh() for _ in range(_SESSIONS)]

    def draw(self, at_s: float) -> VirtualJob:
        """The next job of some session: a new seed, a new prompt, another end, another size, or all of it new."""
        rng = self._rng
        index = int(rng.integers(len(self._states)))
        what, now = rng.random(), dict(self._states[index])
        if what < 0.45:
            now["seed"] = int(rng.integers(2**31))
        elif what < 0.6:
            now["text"], now["seed"] = int(rng.integers(2**31)), int(rng.integers(2**31))
        elif what < 0.75:
            now["end"] = str(rng.choice(["plain", "scaled", "faces"]))
        elif what < 0.9:
            now |= self._size()
        else:
            now = self._fresh()
        self._states[index] = now
        made = _graph(now)
        facts = JobFacts.of(made, _OUTPUT)
        luck = {
            key: float(rng.poisson(_FOUND) * now["batch"]) * (now["side"] / 1024) ** 2
            if node.work.class_type == "facedetailer"
            else math.exp(_NOISE * float(rng.normal()))
            for key, node in facts.nodes.items()
        }
        luck |= {key: 1.0 for key, node in facts.nodes.items() if node.loads}
        return VirtualJob(at_s=at_s, graph=made, outputs=_OUTPUT, facts=facts, luck=luck)

    def _fresh(self) -> dict[str, Any]:
        rng = self._rng
        return {
            "model": str(rng.choice(list(_MODELS), p=[0.5, 0.3, 0.2])),
            "text": int(rng.integers(2**31)),
            "seed": int(rng.integers(2**31)),
            "end": str(rng.choice(["plain", "plain", "scaled", "faces"])),
            "refined": bool(rng.random() < 0.3),
            **self._size(),
        }

    def _size(self) -> dict[str, Any]:
        rng = self._rng
        return {"steps": int(rng.choice(_STEPS)), "side": int(rng.choice(_SIDES)), "batch": int(rng.choice(_BATCHES))}


def _graph(now: Mapping[str, Any]) -> Graph:
    def node(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": name, "inputs": inputs}

    def sampler(latent: str, denoise: float) -> dict[str, Any]:
        return node(
            "KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=[latent, 0], cfg=7.0,
            seed=now["seed"], steps=now["steps"], sampler_name="euler", scheduler="normal", denoise=denoise,
        )  # fmt: skip

    graph = {
        "4": node("CheckpointLoaderSimple", ckpt_name=now["model"]),
        "5": node("EmptyLatentImage", width=now["side"], height=now["side"], batch_size=now["batch"]),
        "6": node("CLIPTextEncode", clip=["4", 1], text=f"a lighthouse, number {now['text']}"),
        "7": node("CLIPTextEncode", clip=["4", 1], text="blurred"),
        "3": sampler("5", 1.0),
    }
    latent, image = "3", "8"
    if now["refined"]:
        graph["10"] = node("LatentUpscaleBy", samples=["3", 0], upscale_method="nearest-exact", scale_by=1.5)
        graph["11"] = sampler("10", 0.5)
        latent = "11"
    graph["8"] = node("VAEDecode", samples=[latent, 0], vae=["4", 2])
    if now["end"] == "scaled":
        graph["12"] = node("ImageScaleBy", image=["8", 0], upscale_method="lanczos", scale_by=2.0)
        image = "12"
    elif now["end"] == "faces":
        graph["13"] = node("FaceDetailer", image=["8", 0], model=["4", 0], steps=20)
        image = "13"
    graph["9"] = node("SaveImage", images=[image, 0], filename_prefix="fleet")
    return graph


def arrivals(load: float, seed: int, count: int = WARM_UP + JOBS) -> list[VirtualJob]:
    """Poisson arrivals at this share of what the servers could do with everything in memory and nothing cached."""
    rng = np.random.default_rng(seed)
    sessions = Sessions(rng)
    jobs = [sessions.draw(0.0) for _ in range(count)]
    warm = Server(world=WORLD, name="", speed=1.0, models=OrderedDict.fromkeys(_MODELS))
    mean_s = float(np.mean([_REST_S + sum(warm.would_take(job).values()) for job in jobs]))
    at_s = np.cumsum(rng.exponential(mean_s / (load * sum(SPEEDS.values())), size=count))
    for job, time_s in zip(jobs, at_s, strict=True):
        job.at_s = float(time_s)
    return jobs


def measure(name: str, load: float, seeds: Sequence[int], count: int) -> Row:
    """Medians over the seeds of the completion of jobs after the warm-up, and of how forecasts were off."""
    found: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for key, value in values.items():
            found.setdefault(key, []).append(value)

    for seed in seeds:
        took_s, placing = simulate(WORLD, arrivals(load, seed, count), WAYS[name])
        p50_s, p95_s, p99_s = np.quantile(took_s[WARM_UP:], (0.5, 0.95, 0.99))
        note(p50_s=float(p50_s), mean_s=float(np.mean(took_s[WARM_UP:])), p95_s=float(p95_s), p99_s=float(p99_s))
        if isinstance(placing, Ours):
            judged = placing.judged[WARM_UP:]
            note(
                median_error=float(np.median([abs(f.quantile(0.5) / s - 1.0) for f, s in judged])),
                below_p95=float(np.mean([s <= f.quantile(0.95) for f, s in judged])),
            )
    return {"load": load, "way": name, **{key: float(np.median(values)) for key, values in found.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all ways at all loads; 0 when the aims are met."""
    parser = argparse.ArgumentParser(prog="python -m eval comfy_fleet", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=_SEEDS)
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"after {WARM_UP} to warm up")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    given = parser.parse_args(arguments)
    seeds = list(range(given.seed, given.seed + given.seeds))
    rows: list[Row] = []
    claims: list[Claim] = []
    for load in LOADS:
        found = {name: measure(name, load, seeds, WARM_UP + given.jobs) for name in WAYS}
        rows += found.values()
        p95_s = {name: float(row["p95_s"] or 0.0) for name, row in found.items()}
        best_s = min(p95_s[name] for name in BASELINES)
        claims.append(claim(f"P95 below round robin@{load}", 1.0 - p95_s["ours"] / p95_s["round robin"], ">=", 0.35))
        claims.append(claim(f"P95 below the best baseline@{load}", 1.0 - p95_s["ours"] / best_s, ">=", 0.15))
        print(table(list(found.values())), flush=True)
    command = " ".join(["python -m eval comfy_fleet", *(sys.argv[1:] if arguments is None else arguments)])
    print(write_result(given.out, command, rows, claims, seeds=seeds))
    return 0 if all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The jobs of `comfy_servers`: graphs that clients work on, when they come, and what their nodes took on a real server.

Graphs have the shapes of ComfyUI's own examples (text to image, two passes, image to image, an upscaled picture, both
pictures of two passes), with the steps, samplers and batches of its templates and small pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.comfy_virtual import VirtualJob, World
from swarmx.compat.comfyui.forecasts import JobFacts, NodeFacts
from swarmx.compat.comfyui.graph import Graph
from swarmx.neural.heads.comfy_nodes import NodeWork, node_works

MODELS: Mapping[str, int] = {"small.safetensors": 2, "large.safetensors": 4}  # and their blocks
_SESSIONS = 8
_STEPS, _SIDES, _BATCHES = (4, 8, 12, 20, 20, 25, 30, 50), (64, 96, 128, 160), (1, 1, 1, 2)
_SAMPLERS = ("euler", "euler", "euler", "heun", "dpmpp_2m")
# Seconds of nodes of a real server on one core (74 graphs, ComfyUI 0.3.64, both checkpoints): a constant, and so much
# for each of a node's amounts.
_MEASURED: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("ksampler", "small.safetensors"): (0.025, 0.0078, 0.197, 0.302),
    ("ksampler", "large.safetensors"): (0.0, 0.022, 0.942, 1.606),
    ("vaedecode", ""): (0.0, 11.7),
    ("vaeencode", ""): (0.0, 11.7),
    ("saveimage", ""): (0.001, 0.1),
    ("imagescaleby", ""): (0.001, 0.045),
}
_LOAD_S, _OTHER_S = 0.78, 0.0016
_NOISE = 0.08
_REST_S = 0.01  # of an emulated server's job over HTTP, beside its nodes
FAKE_SPEEDS: Mapping[str, float] = {"one": 1.0, "two": 0.7, "three": 0.45, "four": 0.25}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A job and when it comes, in seconds from the beginning."""

    at_s: float
    graph: Graph


class Sessions:
    """Clients that work on a graph each: most jobs are near the session's last one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._states = [self._fresh() for _ in range(_SESSIONS)]

    def draw(self) -> Graph:
        """The next job of some session: a new seed, a new prompt, another size, or all of it new."""
        index, what = int(self._rng.integers(_SESSIONS)), self._rng.random()
        now = {**self._states[index], "seed": int(self._rng.integers(2**31))}
        if 0.5 <= what < 0.65:
            now["text"] = int(self._rng.integers(2**31))
        elif 0.65 <= what < 0.85:
            now |= self._size()
        elif what >= 0.85:
            now = self._fresh()
        self._states[index] = now
        return graph_of(now)

    def _fresh(self) -> dict[str, Any]:
        rng = self._rng
        shape = str(rng.choice(["text", "passes", "both", "image", "scaled"], p=[0.5, 0.15, 0.1, 0.15, 0.1]))
        model, seed = str(rng.choice(list(MODELS), p=[0.6, 0.4])), int(rng.integers(2**31))
        return {"shape": shape, "model": model, "text": seed, "seed": seed, **self._size()}

    def _size(self) -> dict[str, Any]:
        rng = self._rng
        return {
            "steps": int(rng.choice(_STEPS)),
            "side": int(rng.choice(_SIDES)),
            "batch": int(rng.choice(_BATCHES)),
            "sampler": str(rng.choice(_SAMPLERS)),
            "cfg": float(rng.choice([7.0, 7.0, 7.0, 7.0, 1.0])),
        }


def graph_of(now: Mapping[str, Any]) -> Graph:
    """A graph in API format."""

    def node(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": name, "inputs": inputs}

    def sampler(latent: str, steps: int, denoise: float) -> dict[str, Any]:
        return node(
            "KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=[latent, 0], cfg=now["cfg"],
            seed=now["seed"], steps=steps, sampler_name=now["sampler"], scheduler="normal", denoise=denoise,
        )  # fmt: skip

    def decoded(latent: str) -> dict[str, Any]:
        return node("VAEDecode", samples=[latent, 0], vae=["4", 2])

    def saved(image: str) -> dict[str, Any]:
        return node("SaveImage", images=[image, 0], filename_prefix="fleet")

    shape, side, batch = now["shape"], now["side"], now["batch"]
    made = {
        "4": node("CheckpointLoaderSimple", ckpt_name=now["model"]),
        "5": node("EmptyLatentImage", width=side, height=side, batch_size=batch),
        "6": node("CLIPTextEncode", clip=["4", 1], text=f"a lighthouse, number {now['text']}"),
        "7": node("CLIPTextEncode", clip=["4", 1], text="blurred"),
        "3": sampler("5", now["steps"], 1.0),
    }
    latent = "3"
    if shape == "image":
        made["1"] = node("EmptyImage", width=side, height=side, batch_size=batch, color=now["text"] % 0xFFFFFF)
        made["5"] = node("VAEEncode", pixels=["1", 0], vae=["4", 2])
        made["3"] = sampler("5", now["steps"], 0.6)
    if shape in ("passes", "both"):
        made["10"] = node("LatentUpscaleBy", samples=["3", 0], upscale_method="nearest-exact", scale_by=1.5)
        made["11"] = sampler("10", max(2, now["steps"] // 2), 0.5)
        latent = "11"
    if shape == "both":
        made["12"], made["13"] = decoded("3"), saved("12")
    made["8"] = decoded(latent)
    if shape == "scaled":
        made["14"] = node("ImageScaleBy", image=["8", 0], upscale_method="bicubic", scale_by=2.0)
    made["9"] = saved("14" if shape == "scaled" else "8")
    return made


def measured_s(work: NodeWork, *, loaded: bool) -> float:
    """Seconds of a node on the core that it was measured on. Its file is read again, even where the disk still has it
    in memory, unless its result is there."""
    if work.class_type == "checkpointloadersimple":
        return _LOAD_S * (0.5 if loaded else 1.0)
    found = _MEASURED.get((work.class_type, work.model)) or _MEASURED.get((work.class_type, ""))
    return _OTHER_S if found is None else found[0] + sum(c * a for c, a in zip(found[1:], work.amounts, strict=True))


def luck_of(signature: str, seed: int) -> float:
    """How much slower or faster than measured a node is, wherever and whenever it runs: by the name of what it computes
    (`signatures`), so that all ways have the same luck."""
    return math.exp(_NOISE * float(np.random.default_rng([seed, int(signature, 16)]).normal()))


def work_s(graphs: Sequence[Graph]) -> float:
    """Mean seconds of the graphs where they were measured, each alone."""
    return float(np.mean([sum(measured_s(w, loaded=True) for w in node_works(g).values()) for g in graphs]))


def arrivals(rng: np.random.Generator, count: int, *, load: float, capacity: float) -> list[Arrival]:
    """Jobs of some sessions, at random moments, at this share of what the servers can do, which is `capacity` seconds
    of measured work a second."""
    sessions = Sessions(rng)
    graphs = [sessions.draw() for _ in range(count)]
    at_s = np.cumsum(rng.exponential(work_s(graphs) / (load * capacity), size=count))
    return [Arrival(at_s=float(each_s), graph=graph) for each_s, graph in zip(at_s, graphs, strict=True)]


def _node_s(node: NodeFacts, speed: float, in_memory: Mapping[str, None]) -> float:
    return measured_s(node.work, loaded=node.loads <= in_memory.keys()) / speed


FAKES = World(speeds=FAKE_SPEEDS, models=len(MODELS), node_s=_node_s, rest_s=_REST_S)
"""The emulated servers in virtual time."""


def virtual(jobs: Sequence[Arrival], seed: int) -> list[VirtualJob]:
    """The jobs as `FAKES` take them, with the luck that they have at emulated servers."""
    found = []
    for job in jobs:
        outputs = tuple(key for key, node in job.graph.items() if node["class_type"] == "SaveImage")
        facts = JobFacts.of(job.graph, outputs)
        luck = {key: luck_of(node.signature, seed) for key, node in facts.nodes.items()}
        found.append(VirtualJob(at_s=job.at_s, graph=job.graph, outputs=outputs, facts=facts, luck=luck))
    return found

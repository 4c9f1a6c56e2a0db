"""The image head: how long a ComfyUI graph takes on a device, from steps x resolution x batch x model and history."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from swarmx.neural.facts import DeviceFacts
from swarmx.neural.head import Floats, HeadSpec
from swarmx.neural.heads.comfy_graph import ImageJob
from swarmx.neural.net import Floats32

_COUNTS = ("samplers", "upscalers", "language", "controls", "video", "masks")
_AMOUNTS = ("nodes", "links", "steps", "megapixels", "batch", "work", "model_b")
IMAGE = HeadSpec(
    name="image",
    version=1,
    features=(
        *(f"log_{name}" for name in (*_AMOUNTS, *_COUNTS)),
        "steps_known", "model_known", "eight_bit", "cold", "log_memory_gib", "log_bandwidth_gbs", "log_tflops",
        "device_known", "log_squeeze", "log_roofline_s", "graph_factor", "device_factor", "log_graph_seen",
        "log_device_seen",
    ),
    unit="s",
    softening=0.05,
)  # fmt: skip

_TOKENS_A_MEGAPIXEL = 4096.0
_FLOPS_USED = 0.4
_BASE_S, _NODE_S, _LOAD_GBS = 0.3, 0.02, 1.0
_USUAL_STEPS, _USUAL_MODEL_B, _USUAL_TFLOPS, _SCALING = 20.0, 2.6, 165.0, 0.6

_GRAPH_PRIOR, _DEVICE_PRIOR, _ROUNDS = 0.1, 0.3, 12


class Factors(msgspec.Struct, frozen=True, kw_only=True):
    """What history says: log factors over the estimate for everything, this graph and this device, and how many runs
    the last two rest on."""

    overall: float = 0.0
    graph: float = 0.0
    device: float = 0.0
    graph_seen: int = 0
    device_seen: int = 0


class ImageHistory:
    """Measured seconds over `estimate_s` as overall * graph * device, each a factor learned from the runs so far.

    A ridge on log seconds, solved by backfitting: a graph that ran on one device is known on all, and so is a device
    that ran one graph. Keeps the last `size` pairs of graph and device with the mean of their runs.
    """

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._pairs: dict[tuple[str, str], tuple[float, int]] = {}
        self._fitted: tuple[float, dict[str, tuple[float, int]], dict[str, tuple[float, int]]] | None = None

    def observe(self, graph: str, device: str, log_factor: float) -> None:
        """One run took exp(`log_factor`) times `estimate_s`. What is not finite is no observation."""
        if not math.isfinite(log_factor):
            return
        mean, count = self._pairs.pop((graph, device), (0.0, 0))
        self._pairs[graph, device] = (mean + (log_factor - mean) / (count + 1), count + 1)
        if len(self._pairs) > self._size:
            del self._pairs[next(iter(self._pairs))]
        self._fitted = None

    def factors(self, graph: str, device: str) -> Factors:
        """The factors for a graph on a device; 0, on no run, for what was never seen."""
        if not self._pairs:
            return Factors()
        if self._fitted is None:
            self._fitted = self._fit()
        overall, graphs, devices = self._fitted
        of_graph, graph_seen = graphs.get(graph, (0.0, 0))
        of_device, device_seen = devices.get(device, (0.0, 0))
        return Factors(
            overall=overall, graph=of_graph, device=of_device, graph_seen=graph_seen, device_seen=device_seen
        )

    def _fit(self) -> tuple[float, dict[str, tuple[float, int]], dict[str, tuple[float, int]]]:
        graphs = {name: i for i, name in enumerate(dict.fromkeys(graph for graph, _ in self._pairs))}
        devices = {name: i for i, name in enumerate(dict.fromkeys(device for _, device in self._pairs))}
        g = np.array([graphs[graph] for graph, _ in self._pairs])
        d = np.array([devices[device] for _, device in self._pairs])
        y = np.array([mean for mean, _ in self._pairs.values()])
        runs = np.array([count for _, count in self._pairs.values()])
        g_seen, d_seen = np.bincount(g), np.bincount(d)
        overall = float(np.median(y))
        of_graph, of_device = np.zeros(len(graphs)), np.zeros(len(devices))
        for _ in range(_ROUNDS):
            of_device = np.bincount(d, y - overall - of_graph[g]) / (d_seen + _DEVICE_PRIOR)
            of_graph = np.bincount(g, y - overall - of_device[d]) / (g_seen + _GRAPH_PRIOR)
        g_runs, d_runs = np.bincount(g, runs), np.bincount(d, runs)
        return (
            overall,
            {name: (float(of_graph[i]), int(g_runs[i])) for name, i in graphs.items()},
            {name: (float(of_device[i]), int(d_runs[i])) for name, i in devices.items()},
        )


def estimate_s(job: ImageJob, device: DeviceFacts, *, cold: bool = False) -> float:
    """Seconds by arithmetic alone: two operations a parameter and latent token, twice for guidance, a sampler step.

    A megapixel is 4096 latent tokens (8x8 pixels a latent, 2x2 latents a token; Peebles and Xie, arXiv 2212.09748); the
    usual device reaches 0.4 of its FLOPS. Other devices take its time over the 0.6th power of their FLOPS, whatever
    the job: a product of what is the job's and what is the device's, as `ImageHistory` needs it. What the graph does
    not say counts as 20 steps a sampler, one megapixel, and a 2.6B model. `cold`: the weights are loaded first, at
    1 GB/s. Always finite, above zero.
    """
    model_b = _or(job.model_b, _USUAL_MODEL_B)
    usual = _or(job.steps, _USUAL_STEPS * job.samplers) * _or(job.megapixels, 1.0) * _or(job.batch, 1.0)
    work = _or(job.work, usual) if job.samplers > 0 else 0.0
    sampling_s = 4e9 * model_b * _TOKENS_A_MEGAPIXEL * work / (_USUAL_TFLOPS * 1e12 * _FLOPS_USED)
    nodes_s = _BASE_S + _NODE_S * _or(job.nodes, 1.0)
    load_s = model_b * (1.0 if job.eight_bit else 2.0) / _LOAD_GBS if cold and job.samplers > 0 else 0.0
    return float((nodes_s + load_s + sampling_s) * (_USUAL_TFLOPS / _or(device.tflops, _USUAL_TFLOPS)) ** _SCALING)


def image_rows(
    jobs: Sequence[ImageJob], devices: Sequence[DeviceFacts], cold: Sequence[bool], factors: Iterable[Factors]
) -> tuple[Floats32, Floats]:
    """Features [rows, features] of IMAGE, and anchors [rows]; unknown amounts are NaN."""
    estimates = [estimate_s(j, d, cold=c) for j, d, c in zip(jobs, devices, cold, strict=True)]
    known = list(factors)
    rows = []
    for job, device, is_cold, estimate, f in zip(jobs, devices, cold, estimates, known, strict=True):
        weights_gb = _or(job.model_b, _USUAL_MODEL_B) * (1.0 if job.eight_bit else 2.0)
        rows.append(
            (
                *(_log(getattr(job, name)) for name in _AMOUNTS),
                *(math.log1p(getattr(job, name)) for name in _COUNTS),
                float(math.isfinite(job.steps)), float(math.isfinite(job.model_b)), float(job.eight_bit),
                float(is_cold), _log(device.memory_gib), _log(device.bandwidth_gbs), _log(device.tflops),
                float(math.isfinite(device.tflops)), _log(weights_gb / device.memory_gib), math.log(estimate),
                f.graph, f.device, math.log1p(f.graph_seen), math.log1p(f.device_seen),
            )
        )  # fmt: skip
    features = np.array(rows, dtype=np.float32).reshape(len(rows), len(IMAGE.features))
    expected = [e * math.exp(f.overall + f.graph + f.device) for e, f in zip(estimates, known, strict=True)]
    anchor: Floats = np.log(np.array(expected, dtype=np.float64) + IMAGE.softening)
    return features, anchor


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) and value > 0.0 else otherwise


def _log(value: float) -> float:
    return math.log(value) if math.isfinite(value) and value > 0.0 else math.nan

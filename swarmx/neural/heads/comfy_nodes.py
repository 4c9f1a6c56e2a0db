"""What each node of a ComfyUI graph (API format) has to do: evaluations of a network, pixels, weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from swarmx.neural.heads.comfy_graph import Node, follow, is_link, nodes_of, sources_of, target, upstream, weight_names

_MEGAPIXEL = 1024.0 * 1024.0
_MAX_SIDE, _MAX_BATCH, _MAX_STEPS, _MAX_FACTOR = 65_536.0, 4096.0, 10_000.0, 64.0
_MAX_MEGAPIXELS = _MAX_SIDE * _MAX_SIDE / _MEGAPIXEL
_LEAST_WALK, _MAX_WALK, _WALKS = 16, 500, 20_000

# Evaluations of the network that a step of a sampler takes; all others take one (k-diffusion's sampling functions).
_ORDERS = {
    **dict.fromkeys(
        (
            "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
            "dpmpp_sde", "dpmpp_sde_gpu", "exp_heun_2_x0", "exp_heun_2_x0_sde", "sa_solver_pece", "seeds_2",
        ),
        2.0,
    ),
    "seeds_3": 3.0,
}  # fmt: skip
_SINGLE_LAST = frozenset({"heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"})
_CARRIERS = ("samples", "latent_image", "latent", "image", "images", "pixels", "video", "mask")
_FACTORS = ("scale_by", "upscale_by", "rescale_factor")
_PIXELS = ("decode", "encode", "image", "mask", "latent", "upscale", "video", "blur", "save", "preview")


class NodeWork(msgspec.Struct, frozen=True, kw_only=True):
    """A node's work. `model` names the weights that it runs or loads, "" for none.

    `amounts` are what its seconds should be linear in, beside a constant. For a sampler: evaluations of its network,
    these x pictures x megapixels of one, and that x megapixels of one (attention). For a node that handles pictures:
    their megapixels together. For others nothing. A megapixel is 1024 x 1024; a size that the graph does not say counts
    as one.
    """

    node: str
    class_type: str
    model: str = ""
    amounts: tuple[float, ...] = ()


class _Graph(NamedTuple):
    """A graph whose nodes were read once each: those that feed each, and the weights that it names first, by id."""

    nodes: Mapping[str, Node]
    sources: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, str]
    walk: int
    """How many nodes may be seen from one: a graph of thousands must not take seconds to read."""


def node_works(graph: object) -> dict[str, NodeWork]:
    """By node id; empty for what is no graph. Never fails, reads the first 2,000 nodes."""
    nodes = dict(nodes_of(graph))
    read = _Graph(
        nodes,
        {key: sources_of(inputs, nodes) for key, (_, inputs) in nodes.items()},
        {key: found for key, (_, inputs) in nodes.items() if (found := next(weight_names(inputs), ""))},
        max(_LEAST_WALK, min(_MAX_WALK, _WALKS // max(1, len(nodes)))),
    )
    return {key: _work(key, read) for key in nodes}


def _work(key: str, graph: _Graph) -> NodeWork:
    name, inputs = graph.nodes[key]
    if is_sampler(name, inputs):
        evaluations = _evaluations(key, graph)
        megapixels, pictures = _size(key, graph)
        work = evaluations * pictures * megapixels
        amounts: tuple[float, ...] = (evaluations, work, work * megapixels)
        model = _model(key, graph)
    elif key in graph.weights:
        amounts, model = (), graph.weights[key]
    else:
        model = _model(key, graph) if "code" in name else ""
        amounts = ()
        if "text" not in name and any(part in name for part in _PIXELS):
            amounts = (math.prod(_size(key, graph)),)
    return NodeWork(node=key, class_type=name, model=model, amounts=amounts)


def is_sampler(name: str, inputs: Mapping[str, object]) -> bool:
    """Whether a node runs a diffusion network: it samples a latent, by itself or by a guider."""
    return "sampler" in name and any(is_link(inputs.get(part)) for part in ("latent_image", "latent", "samples"))


def _evaluations(key: str, graph: _Graph) -> float:
    """Evaluations of the network: steps x order of the sampler x 2 with guidance.

    A `denoise` below 1 makes the steps smaller, not fewer. One step, of order one, with guidance, where it is not said.
    """
    said = (graph.nodes[near][1].get("sampler_name") for near in upstream(key, graph.sources, graph.walk))
    sampler = next((name for name in said if isinstance(name, str)), "")  # a link to a selector: that has the name
    order = _ORDERS.get(sampler, 1.0)
    _, inputs = graph.nodes[key]
    steps = follow(_nearest(key, graph, "steps"), graph.nodes, most=_MAX_STEPS)
    steps = steps if steps >= 1.0 else 1.0
    first = follow(inputs.get("start_at_step"), graph.nodes, most=_MAX_STEPS)
    last = follow(inputs.get("end_at_step"), graph.nodes, most=_MAX_STEPS)
    steps = max(1.0, (min(last, steps) if last > 0.0 else steps) - (first if first > 0.0 else 0.0))
    found = order * steps - (order - 1.0 if sampler in _SINGLE_LAST else 0.0)
    return found * (1.0 if _unguided(key, graph) else 2.0)


def _unguided(key: str, graph: _Graph) -> bool:
    guider = graph.nodes[key][1].get("guider")
    if is_link(guider) and target(guider) in graph.nodes and graph.nodes[target(guider)][0] == "basicguider":
        return True
    return follow(_nearest(key, graph, "cfg"), graph.nodes, most=1000.0) == 1.0


def _size(key: str, graph: _Graph) -> tuple[float, float]:
    """Megapixels of one picture, and pictures or frames, at the output of a node; 1 each where nothing says."""
    nodes = graph.nodes
    factor, current, seen = 1.0, key, set[str]()
    while current not in seen and len(seen) < graph.walk:
        seen.add(current)
        inputs = nodes[current][1]
        width, height = (follow(inputs.get(side), nodes, most=_MAX_SIDE) for side in ("width", "height"))
        if width > 0.0 and height > 0.0:
            counts = (follow(inputs.get(part), nodes, most=_MAX_BATCH) for part in ("batch_size", "length"))
            megapixels = min(factor * width * height / _MEGAPIXEL, _MAX_MEGAPIXELS)
            return megapixels, math.prod(count for count in counts if count > 0.0)
        by = next((value for part in _FACTORS if (value := follow(inputs.get(part), nodes, most=_MAX_FACTOR)) > 0), 1.0)
        factor = min(factor * by * by, _MAX_MEGAPIXELS)  # many such nodes in a row would make it endless
        carrier = next((inputs[part] for part in _CARRIERS if is_link(inputs.get(part))), None)
        if carrier is None or target(carrier) not in nodes:
            break
        current = target(carrier)
    return factor, 1.0


def _model(key: str, graph: _Graph) -> str:
    """The weights that feed a node, the nearest first."""
    for near in upstream(key, graph.sources, graph.walk):
        if near in graph.weights and "lora" not in graph.nodes[near][0]:
            return graph.weights[near]
    return ""


def _nearest(key: str, graph: _Graph, name: str) -> object:
    near_inputs = (graph.nodes[near][1] for near in upstream(key, graph.sources, graph.walk))
    return next((inputs[name] for inputs in near_inputs if name in inputs), None)

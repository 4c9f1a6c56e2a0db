"""Reads a ComfyUI graph (API format) for what its run will cost. It never fails: what cannot be read is unknown."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

import msgspec

MAX_NODES = 2000
_MAX_STEPS, _MAX_SIDE, _MAX_BATCH = 10_000.0, 65_536.0, 4096.0
_MAX_HOPS, _MAX_WALK = 8, 500
_MEGAPIXEL = 1024.0 * 1024.0

_KINDS = {
    "samplers": re.compile(r"^ksampler(?!select)|^samplercustom|_sampler?$|sampler$|^detailer|^ultimatesdupscale"),
    "upscalers": re.compile(r"upscale|supir_sample|imagescaleby"),
    "language": re.compile(r"ollama(generate|vision)|gemini|llm|chatgpt|florence"),
    "controls": re.compile(
        r"^(apply)?controlnet(?!load)|^ipadapter|^apply(instantid|pulid)|photomakerencode|infiniteyouapply|redux"
    ),
    "video": re.compile(r"video|ltxv|animatediff|svd|save(animated)?web|vhs_"),
    "masks": re.compile(r"^rembg|samloader|detectorprovider|facedetailer|segs|imagetomask|autocrop"),
}  # fmt: skip

# The size of the network that samples, in billions of parameters, by the names that checkpoints and nodes have.
_SIZES: tuple[tuple[re.Pattern[str], float], ...] = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"qwen.?image", 20.0), (r"hidream", 17.0), (r"wan2?.*14b|cosmos.*14b|comsmos.*14b", 14.0),
        (r"hunyuan.?(video|img2video)|hunyuan_?imageto", 13.0), (r"flux|kontext", 12.0),
        (r"sd.?3.?5.?large|3\.5_large", 8.1), (r"aura.?flow", 6.8), (r"sd.?3.?5.?medium|3\.5_medium", 2.5),
        (r"cascade", 3.6), (r"supir", 3.9), (r"sd.?3", 2.0), (r"ltxv|ltx.?video", 2.0), (r"hunyuan.?dit", 1.5),
        (r"pixart|sana", 0.6),
        (r"xl|playground|juggernaut|pony|illustrious|photomaker|instantid|sketch_portrait|ghibli", 2.6),
        (r"sd.?1.?5|v1-5|sd_?15|dreamshaper|anything.?v", 0.86),
    )
)  # fmt: skip
_EIGHT_BIT = re.compile(r"fp8|8bit|8-bit|q8|e4m3|e5m2|int8")
_WEIGHTS = re.compile(r"\.(safetensors|ckpt|sft|gguf|pth|pt|bin)$")

_NAN = float("nan")

Node = tuple[str, Mapping[str, object]]


class ImageJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a graph asks for; NaN where it does not say.

    `steps` are those of all samplers together, `megapixels` of one picture (1024 x 1024), `batch` pictures or frames,
    `work` the megapixel-steps of all samplers; `model_b` billions of parameters, guessed from names.
    """

    nodes: float = _NAN
    links: float = _NAN
    steps: float = _NAN
    megapixels: float = _NAN
    batch: float = _NAN
    work: float = _NAN
    model_b: float = _NAN
    eight_bit: bool = False
    samplers: int = 0
    upscalers: int = 0
    language: int = 0
    controls: int = 0
    video: int = 0
    masks: int = 0


def read_graph(graph: object) -> ImageJob:
    """The job of a graph `{id: {"class_type": str, "inputs": {name: value, or [id, output]}}}`.

    Anything else in any place is passed over; a graph that is no mapping of nodes gives a job that knows nothing, for
    which the head's answer is its wide prior. The first 2,000 nodes are read.
    """
    nodes = dict(nodes_of(graph))
    if not nodes:
        return ImageJob()
    counts = kinds(name for name, _ in nodes.values())
    sources = {key: sources_of(inputs, nodes) for key, (_, inputs) in nodes.items()}
    of_samplers = [
        _sampling(key, nodes, sources) for key, (name, _) in nodes.items() if _KINDS["samplers"].search(name)
    ]
    steps = [s for s, _, _ in of_samplers]
    work = [s * m * b for s, m, b in of_samplers]
    sizes = [m for _, m, _ in of_samplers if math.isfinite(m)]
    batches = [b for _, _, b in of_samplers if math.isfinite(b)]
    names = [text for _, inputs in nodes.values() for text in weight_names(inputs)]
    return ImageJob(
        nodes=float(len(nodes)),
        links=float(sum(is_link(value) for _, inputs in nodes.values() for value in inputs.values())),
        steps=math.fsum(steps) if steps else _NAN,
        megapixels=max(sizes, default=_NAN),
        batch=max(batches, default=_NAN),
        work=math.fsum(work) if work else _NAN,
        model_b=model_size_b([*names, *(name for name, _ in nodes.values())]),
        eight_bit=eight_bit(names),
        **counts,
    )


def graph_key(graph: object) -> str:
    """The same for graphs that cost the same: their nodes, numbers and weights without prompts, names and seeds."""
    digest = blake2b(digest_size=8)
    for _, (name, inputs) in sorted(nodes_of(graph), key=lambda item: (item[1][0], item[0])):
        digest.update(name.encode(errors="replace"))
        for key in sorted(inputs):
            value = inputs[key]
            if "seed" in key or key == "noise":
                continue
            if isinstance(value, bool | int | float):
                digest.update(f"\0{key}={value}".encode(errors="replace"))
            elif isinstance(value, str) and _WEIGHTS.search(value[-16:].lower()):
                digest.update(f"\0{key}={value[:200]}".encode(errors="replace"))
    return digest.hexdigest()


def kinds(class_names: Iterable[str]) -> dict[str, int]:
    """How many nodes of each kind that costs."""
    lowered = [name.lower() for name in class_names]
    return {kind: sum(bool(pattern.search(name)) for name in lowered) for kind, pattern in _KINDS.items()}


def model_size_b(names: Iterable[str]) -> float:
    """The largest model that the names hint at, in billions of parameters; NaN without a hint."""
    lowered = [name.lower() for name in names]
    found = (next((size for pattern, size in _SIZES if pattern.search(name)), _NAN) for name in lowered)
    return max((size for size in found if math.isfinite(size)), default=_NAN)


def eight_bit(names: Iterable[str]) -> bool:
    """Whether a name says that the weights have eight bits."""
    return any(_EIGHT_BIT.search(name.lower()) for name in names)


def nodes_of(graph: object) -> Iterator[tuple[str, Node]]:
    """Ids with (class in lower case, inputs), of what is a node."""
    if not isinstance(graph, Mapping):
        return
    read = 0
    for key, node in graph.items():
        if not isinstance(node, Mapping):
            continue
        name, inputs = node.get("class_type"), node.get("inputs")
        if isinstance(name, str) and name:
            yield str(key)[:64], (name[:100].lower(), inputs if isinstance(inputs, Mapping) else {})
            read += 1
            if read == MAX_NODES:
                return


def _sampling(
    key: str, nodes: Mapping[str, Node], sources: Mapping[str, tuple[str, ...]]
) -> tuple[float, float, float]:
    """Steps, megapixels and batch of a sampler: its own inputs, or the nearest upstream that have them."""
    steps = width = height = batch = _NAN
    for near in upstream(key, sources, _MAX_WALK):
        inputs = nodes[near][1]
        if math.isnan(steps) and "steps" in inputs:
            steps = follow(inputs["steps"], nodes, most=_MAX_STEPS)  # less `denoise` makes them smaller, not fewer
        if math.isnan(width) and "width" in inputs and "height" in inputs:
            width, height = (follow(inputs[side], nodes, most=_MAX_SIDE) for side in ("width", "height"))
            frames = follow(inputs.get("length"), nodes, most=_MAX_BATCH)
            pictures = follow(inputs.get("batch_size"), nodes, most=_MAX_BATCH)
            known = [b for b in (frames, pictures) if b > 0.0]
            batch = math.prod(known) if known else 1.0
    return steps, width * height / _MEGAPIXEL, batch


def upstream(key: str, sources: Mapping[str, tuple[str, ...]], most: int) -> Iterator[str]:
    """A node and what feeds it, nearest first, each once, so many at most, as far as one asks."""
    queue, seen = deque([key]), {key}
    yield key
    while queue:
        for near in sources[queue.popleft()]:
            if near not in seen:
                if len(seen) == most:
                    return
                seen.add(near)
                queue.append(near)
                yield near


def sources_of(inputs: Mapping[str, object], nodes: Mapping[str, Node]) -> tuple[str, ...]:
    """The nodes that feed one with these inputs, each once: it may have more inputs than a walk should look at."""
    return tuple(dict.fromkeys(key for value in inputs.values() if is_link(value) and (key := target(value)) in nodes))


def follow(value: object, nodes: Mapping[str, Node], *, most: float) -> float:
    """A number between 0 and `most`, followed through primitive nodes; NaN when there is none."""
    for _ in range(_MAX_HOPS):
        if isinstance(value, bool):
            return _NAN
        if isinstance(value, int | float):
            try:
                number = float(value)
            except OverflowError:
                return _NAN
            return min(number, most) if number >= 0.0 else _NAN
        if not is_link(value) or (key := target(value)) not in nodes:
            return _NAN
        inputs = nodes[key][1]
        value = next(
            (inputs[name] for name in ("value", "int", "float", "number", "Number", "a") if name in inputs), None
        )
    return _NAN


def weight_names(inputs: Mapping[str, object]) -> Iterator[str]:
    """Names of files of weights among the inputs of a node."""
    for value in inputs.values():
        if isinstance(value, str) and _WEIGHTS.search(value[-16:].lower()):
            yield value[-200:]


def is_link(value: object) -> bool:
    """Whether an input is the output of another node, [id, number]."""
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str | int)


def target(value: object) -> str:
    """The id of the node that a link comes from."""
    return str(value[0])[:64] if isinstance(value, list | tuple) else ""

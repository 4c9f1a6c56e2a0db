"""Public facts about devices and models, from data sheets and model configurations: what latency depends on."""

from __future__ import annotations

from typing import NamedTuple

_NAN = float("nan")


class DeviceFacts(NamedTuple):
    """One device: memory [GiB], memory bandwidth [GB/s], dense bf16 (or fp16) tensor throughput [TFLOPS]."""

    memory_gib: float
    bandwidth_gbs: float
    tflops: float


class ModelFacts(NamedTuple):
    """A language model: billions of parameters in all and per token, layers, width, and what a token caches.

    `kv_width` is the size of one key (or value) vector of a layer, all KV heads together, averaged over the layers;
    a latent of MLA counts as half of it for each. NaN where it is not known.
    """

    params_b: float
    active_b: float
    layers: float
    hidden: float
    kv_width: float


UNKNOWN_DEVICE = DeviceFacts(_NAN, _NAN, _NAN)
UNKNOWN_MODEL = ModelFacts(_NAN, _NAN, _NAN, _NAN, _NAN)

DEVICES: dict[str, DeviceFacts] = {
    "a10g": DeviceFacts(24, 600, 70),
    "a30": DeviceFacts(24, 933, 165),
    "a40": DeviceFacts(48, 696, 150),
    "a100": DeviceFacts(80, 2039, 312),
    "a100-40gb": DeviceFacts(40, 1555, 312),
    "b60": DeviceFacts(24, 456, 98.3),
    "b200": DeviceFacts(180, 7700, 2250),
    "b300": DeviceFacts(268.6, 7750, 2250),
    "gaudi2": DeviceFacts(96, 2450, 432),
    "gb200": DeviceFacts(185, 8000, 2500),
    "gb300": DeviceFacts(277.6, 8000, 2500),
    "gh200": DeviceFacts(96, 4000, 989),
    "h100": DeviceFacts(80, 3350, 989),
    "h200": DeviceFacts(141, 4800, 989),
    "l4": DeviceFacts(24, 300, 121),
    "l40s": DeviceFacts(45, 864, 362),
    "m2-max": DeviceFacts(32, 400, 27),
    "max-1550": DeviceFacts(128, 3277, 832),
    "mi250": DeviceFacts(128, 3277, 362),
    "mi300x": DeviceFacts(192, 5300, 1307),
    "rtx-3090": DeviceFacts(24, 936, 71),
    "rtx-4000-ada": DeviceFacts(20, 360, 107),
    "rtx-4070-ti-super": DeviceFacts(16, 672, 88),
    "rtx-4090": DeviceFacts(24, 1008, 165),
    "rtx-5090": DeviceFacts(32, 1792, 210),
    "rtx-6000-ada": DeviceFacts(48, 960, 364),
    "rtx-pro-6000": DeviceFacts(96, 1792, 468),
    "rx-7900-xtx": DeviceFacts(24, 960, 123),
    "sn40l": DeviceFacts(64, 1638, 638),
    "t4": DeviceFacts(16, 320, 65),
    "v100": DeviceFacts(16, 900, 125),
}

MODELS: dict[str, ModelFacts] = {
    "aquila-7b": ModelFacts(7.3, 7.3, 32, 4096, 4096),
    "bloom-7b1": ModelFacts(7.07, 7.07, 30, 4096, 4096),
    "decilm-7b": ModelFacts(7.04, 7.04, 32, 4096, 268),
    "deepseek-r1": ModelFacts(671, 37, 61, 7168, 288),
    "deepseek-v3": ModelFacts(671, 37, 61, 7168, 288),
    "deepseek-v3.1": ModelFacts(671, 37, 61, 7168, 288),
    "glm-5": ModelFacts(744, 40, 78, 6144, 288),
    "gpt-oss-120b": ModelFacts(116.8, 5.1, 36, 2880, 256),
    "gpt-oss-20b": ModelFacts(20.9, 3.6, 24, 2880, 256),
    "kimi-k2.5": ModelFacts(1040, 32, 61, 7168, 288),
    "llama-2-13b": ModelFacts(13.0, 13.0, 40, 5120, 5120),
    "llama-2-70b": ModelFacts(69.0, 69.0, 80, 8192, 1024),
    "llama-2-7b": ModelFacts(6.74, 6.74, 32, 4096, 4096),
    "llama-3-70b": ModelFacts(70.6, 70.6, 80, 8192, 1024),
    "llama-3-8b": ModelFacts(8.03, 8.03, 32, 4096, 1024),
    "llama-3.1-405b": ModelFacts(405.9, 405.9, 126, 16384, 1024),
    "llama-3.1-70b": ModelFacts(70.6, 70.6, 80, 8192, 1024),
    "llama-3.1-8b": ModelFacts(8.03, 8.03, 32, 4096, 1024),
    "llama-3.2-1b": ModelFacts(1.24, 1.24, 16, 2048, 512),
    "llama-3.2-3b": ModelFacts(3.21, 3.21, 28, 3072, 1024),
    "llama-7b": ModelFacts(6.74, 6.74, 32, 4096, 4096),
    "minimax-m2.5": ModelFacts(229, 10, 62, 3072, 1024),
    "mistral-7b": ModelFacts(7.24, 7.24, 32, 4096, 1024),
    "mixtral-8x7b": ModelFacts(46.7, 12.9, 32, 4096, 1024),
    "opt-6.7b": ModelFacts(6.66, 6.66, 32, 4096, 4096),
    "qwen1.5-7b": ModelFacts(7.72, 7.72, 32, 4096, 4096),
    "qwen2-72b": ModelFacts(72.7, 72.7, 80, 8192, 1024),
    "qwen2-7b": ModelFacts(7.62, 7.62, 28, 3584, 512),
    "qwen3-0.6b": ModelFacts(0.6, 0.6, 28, 1024, 1024),
    "qwen3-235b-a22b": ModelFacts(235, 22, 94, 4096, 512),
    "qwen3-30b-a3b": ModelFacts(30.5, 3.3, 48, 2048, 512),
    "qwen3-32b": ModelFacts(32.8, 32.8, 64, 5120, 1024),
    "qwen3-8b": ModelFacts(8.19, 8.19, 36, 4096, 1024),
    "qwen3.5-397b-a17b": ModelFacts(397, 17, 60, 4096, 128),
}

BYTES_A_WEIGHT = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.03, "fp4": 0.56, "int4": 0.56}

_SUFFIXES = ("-instruct", "-chat", "-hf", "-v0.1", "-fp8", "-nvfp4", "-fp4", "-it")


def device_facts(name: str | None) -> DeviceFacts:
    """Facts of a device by the name that SwarmX uses; every number NaN for one that is not known."""
    return DEVICES.get((name or "").lower(), UNKNOWN_DEVICE)


def model_facts(name: str | None) -> ModelFacts:
    """Facts of a model by its name, as SwarmX or as a hub writes it; every number NaN for one that is not known."""
    return MODELS.get(plain_name(name or ""), UNKNOWN_MODEL)


def plain_name(model: str) -> str:
    """The name of a model without its publisher, tuning and precision: "meta-llama/Llama-3.1-8B-Instruct" is
    "llama-3.1-8b"."""
    name = model.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    while suffix := next((s for s in _SUFFIXES if name.endswith(s)), None):
        name = name.removesuffix(suffix)
    return name

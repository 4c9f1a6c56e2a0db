"""What an engine should take by the roofline of its device, where no profile was ever measured."""

from __future__ import annotations

import math

from swarmx.core.engine import EngineProfile
from swarmx.neural.facts import DeviceFacts, ModelFacts

TYPICAL_DEVICE = DeviceFacts(80.0, 2039.0, 312.0)
TYPICAL_MODEL = ModelFacts(8.0, 8.0, 32.0, 4096.0, 1024.0)

_BANDWIDTH_USED = 0.85
_FLOPS_USED = 0.6
_LAUNCH_S = 30e-6
_ALL_REDUCE_S = 8e-6
_FREE = 0.9
_GIB = 2.0**30


def roofline(
    model: ModelFacts, device: DeviceFacts, *, tensor_parallel: int = 1, bytes_a_weight: float = 2.0
) -> EngineProfile:
    """The step model of a replica of `tensor_parallel` devices, from data sheets alone.

    A decode step reads the active weights and the cache once, at memory bandwidth; a prefill token costs two
    floating-point operations a parameter, and four a layer and width for each token in front of it; a layer costs
    30 us of launches, and two all-reduces more where the model is split. Williams, Waterman, Patterson (CACM 52,
    2009); Pope et al., arXiv 2211.05102. The shares of bandwidth (0.85) and of FLOPS (0.6) that engines reach, and
    the 30 us, are round numbers near the profiles that ship. Facts that are NaN are those of an A100 80 GB and of a
    dense 8B model.
    """
    facts = ModelFacts(*(_known(a, b) for a, b in zip(model, TYPICAL_MODEL, strict=True)))
    spec = DeviceFacts(*(_known(a, b) for a, b in zip(device, TYPICAL_DEVICE, strict=True)))
    bytes_s = spec.bandwidth_gbs * 1e9 * _BANDWIDTH_USED * tensor_parallel
    flops_s = spec.tflops * 1e12 * _FLOPS_USED * tensor_parallel
    kv_bytes = facts.layers * 2.0 * facts.kv_width * 2.0
    layer_s = _LAUNCH_S + (2.0 * _ALL_REDUCE_S if tensor_parallel > 1 else 0.0)
    room = _FREE * spec.memory_gib * _GIB * tensor_parallel - facts.params_b * 1e9 * bytes_a_weight
    return EngineProfile(
        model="roofline",
        device="roofline",
        step_base_s=facts.active_b * 1e9 * bytes_a_weight / bytes_s + facts.layers * layer_s,
        decode_seq_s=2e9 * facts.active_b / flops_s,
        decode_ctx_token_s=kv_bytes / bytes_s,
        prefill_token_s=2e9 * facts.active_b / flops_s,
        prefill_ctx_token_s=4.0 * facts.layers * facts.hidden / flops_s,
        kv_capacity_tokens=max(4096, int(room / kv_bytes)),
    )


def idle_weights_s(
    model: ModelFacts, device: DeviceFacts, *, tensor_parallel: int = 1, bytes_a_weight: float = 2.0
) -> float:
    """Seconds that a decode step needs to read those weights of a mixture of experts that one token leaves idle.

    A batch of b tokens wakes 1 - (1 - active share)^b of them, so that large batches read nearly all; the linear form
    of `EngineProfile` cannot say that. Zero for dense models and for those that are not known.
    """
    idle = model.params_b - model.active_b
    if not idle > 0.0:
        return 0.0
    bandwidth = _known(device.bandwidth_gbs, TYPICAL_DEVICE.bandwidth_gbs)
    return idle * bytes_a_weight / (bandwidth * _BANDWIDTH_USED * tensor_parallel)


def _known(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise

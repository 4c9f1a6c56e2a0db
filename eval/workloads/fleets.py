"""The fleets of the evaluation: how many replicas of which model on which device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from eval.workloads.draft import CPU, FLUX, LARGE, OCR, SDXL, SMALL
from eval.workloads.invented import constant
from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import CallKind, Replica

CPU_MODELS = (CPU, OCR)
CPU_FAST, CPU_SLOW = "cpu-fast", "cpu-slow"

_CPU_UNIT_S: Mapping[str, float] = {CPU_FAST: constant("cpu_fast"), CPU_SLOW: constant("cpu_slow")}


@dataclass(frozen=True, slots=True)
class Row:
    """`count` replicas of a model on a device; with `kv_tokens`, no more than those fit into the KV cache of each."""

    model: str
    device: str
    count: int
    kv_tokens: int | None = None


_HETEROGENEOUS = (
    Row(SMALL, "h100", 4), Row(SMALL, "a100", 2), Row(SMALL, "l40s", 5),
    Row(LARGE, "h100", 4), Row(LARGE, "h200", 1), Row(LARGE, "l40s", 4),
    Row(SDXL, "h100", 5), Row(SDXL, "a100", 6), Row(SDXL, "l40s", 6),
    Row(FLUX, "h100", 2), Row(FLUX, "a100", 3), Row(FLUX, "l40s", 3),
    Row(CPU, CPU_FAST, 3), Row(CPU, CPU_SLOW, 3), Row(OCR, CPU_FAST, 5), Row(OCR, CPU_SLOW, 9),
)  # fmt: skip
_TIGHT_TOKENS = 24_576  # a few calls fill it, and the longest of the workloads fits

FLEETS: Mapping[str, Sequence[Row]] = {
    "heterogeneous": _HETEROGENEOUS,
    "homogeneous": (
        Row(SMALL, "h100", 6), Row(LARGE, "h100", 5), Row(SDXL, "h100", 14), Row(FLUX, "h100", 5),
        Row(CPU, CPU_FAST, 5), Row(OCR, CPU_FAST, 10),
    ),
    "one_model": (Row(SMALL, "h100", 7), Row(SMALL, "a100", 10), Row(SMALL, "l40s", 7)),
    "kv_tight": tuple(
        replace(row, kv_tokens=_TIGHT_TOKENS if row.model in (SMALL, LARGE) else None) for row in _HETEROGENEOUS
    ),
}  # fmt: skip
"""All serve every kind, but for the third, which serves `chat` and `sessions`; the last is the first with little
memory. A replica of the large model is two H100, one H200 or two L40S, as its profile is. The counts are such that
under the default mix the models of a fleet are about equally busy (`load.offered_load`): within a fifth of each
other."""


def fleet(name: str, scale: float = 1.0) -> list[Replica]:
    """The replicas of a named fleet, every count times `scale`, and one at least. Raises ConfigError."""
    if name not in FLEETS:
        raise ConfigError(f"there is no fleet {name!r}, expected one of {', '.join(FLEETS)}.")
    return made(FLEETS[name], scale)


def sized(name: str, replicas: int) -> list[Replica]:
    """A named fleet with about so many replicas in all. Raises ConfigError."""
    return fleet(name, replicas / len(fleet(name)))


def made(rows: Sequence[Row], scale: float = 1.0) -> list[Replica]:
    """Replicas for these rows. Raises ConfigError for a model that has no profile on its device."""
    if not scale > 0.0:
        raise ConfigError(f"a fleet cannot be {scale} times as large, expected a factor above zero.")
    found: list[Replica] = []
    for row in rows:
        profile = profile_of(row.model, row.device)
        if row.kv_tokens is not None:
            profile = msgspec.structs.replace(
                profile, kv_capacity_tokens=min(row.kv_tokens, profile.kv_capacity_tokens)
            )
        kind: CallKind = "image" if profile.max_batch == 1 else "llm"
        for i in range(max(1, round(row.count * scale))):
            found.append(
                Replica(
                    replica_id=f"{row.model}/{row.device}/{i:04d}", model=row.model, kind=kind, device=row.device,
                    url="", profile=profile, provider="simulated", emulated=True,
                )
            )  # fmt: skip
    return found


def profile_of(model: str, device: str) -> EngineProfile:
    """The fitted profile that ships, or that of a processor: a serial server whose unit of work is 10 ms of a fast
    core. Raises ConfigError."""
    if model in CPU_MODELS and device in _CPU_UNIT_S:
        return EngineProfile(
            model=model, device=device, step_base_s=_CPU_UNIT_S[device], call_base_s=constant("cpu_call"), max_batch=1,
            cost_weight=constant("cpu_cost"),
        )  # fmt: skip
    profile = profiles().get((model, device))
    if profile is None:
        models = {m for m, _ in profiles()} | set(CPU_MODELS)
        devices = [d for m, d in profiles() if m == model] or list(_CPU_UNIT_S) * (model in CPU_MODELS)
        raise ConfigError(
            f"there is no profile of {model} on {device}; "
            + (f"it has {', '.join(devices)}." if model in models else f"the models are {', '.join(sorted(models))}.")
        )
    return profile

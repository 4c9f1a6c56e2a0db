"""Replicas that somebody else runs: taken as they are, by address."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import CallKind, Priorities, Replica

# Of a device that nobody profiled we only know that it is some GPU: the speed of an 8B model on an L40S.
UNKNOWN_TEXT = EngineProfile(
    model="unknown",
    device="unknown",
    step_base_s=0.02,
    decode_seq_s=1e-4,
    decode_ctx_token_s=2e-7,
    prefill_token_s=1e-4,
)
UNKNOWN_IMAGE = EngineProfile(model="unknown", device="unknown", step_base_s=0.25, call_base_s=0.3, max_batch=1)


class StaticProvider:
    """Implements `core.ports.Provider` for fixed URLs; whether they answer is for the watch to find out."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = tuple(replicas)

    async def start(self) -> Sequence[Replica]:
        return self._replicas

    async def stop(self) -> None:
        return None


def static_replica(
    *,
    replica_id: str,
    model: str,
    kind: CallKind,
    device: str,
    url: str,
    profile: str | None = None,
    priorities: Priorities = "ignored",
) -> Replica:
    """A replica at a URL, with the fitted profile of (profile or model, device) where there is one.

    Raises ConfigError when a profile is named that does not exist.
    """
    if profile is not None and (profile, device) not in profiles():
        devices = ", ".join(sorted(d for p, d in profiles() if p == profile)) or "no device"
        raise ConfigError(f"replica {replica_id}: profile {profile!r} is known on {devices}, not on {device!r}.")
    fallback = UNKNOWN_TEXT if kind == "llm" else UNKNOWN_IMAGE
    known = profiles().get((profile or model, device), fallback)
    return Replica(
        replica_id=replica_id,
        model=model,
        kind=kind,
        device=device,
        url=url.rstrip("/"),
        profile=msgspec.structs.replace(known, model=model, device=device),
        provider="static",
        emulated=False,
        priorities=priorities,
    )

"""Which GPUs a server computes on: those with room for its share of their memory and the fewest other servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from swarmx.core.errors import ReplicaError
from swarmx.providers.gpus import Gpu

# A server also holds what CUDA itself needs on each of its GPUs, and vLLM counts its share without that.
CONTEXT_BYTES = 512 * 2**20
_GIB = 2**30


@dataclass(slots=True, kw_only=True, eq=False)
class _Claim:
    """What a server may take of each of its GPUs, by UUID; it is `loading` until it answers."""

    bytes_of: dict[str, int]
    loading: bool = True


class GpuPlaces:
    """Where the servers of this process are, and where another one fits. Pure: what GPUs hold is handed in.

    The memory of a GPU is shared by what our servers may take, whether they have taken it yet or not, and what others
    hold. The latter is what is held beyond our claims; while a server of ours is loading there nobody can tell its part
    from theirs, and what they held before counts.
    """

    def __init__(self) -> None:
        self._claims: dict[str, _Claim] = {}
        self._others_bytes: dict[str, int] = {}  # by UUID, as of when nothing of ours was loading there

    def take(self, server: str, gpus: Sequence[Gpu], *, share: float, count: int) -> Sequence[Gpu]:
        """Claim `share` of the memory of `count` of `gpus`, all of one kind, and return them in the order of NVML.

        Of those with room it takes the ones with the fewest of our servers, then with the most room, then the first.
        Raises ReplicaError, with what each has and would need, when they are too few. A claim lasts until `give_back`.
        """
        room = {gpu.index: self._room_bytes(gpu) for gpu in gpus}
        fit = [gpu for gpu in gpus if gpu.fault is None and room[gpu.index] >= need_bytes(gpu, share)]
        fit.sort(key=lambda gpu: (self._servers_on(gpu), -room[gpu.index], gpu.index))
        kinds = {gpu.name: [other for other in fit if other.name == gpu.name] for gpu in fit}  # the best kind first
        chosen = next((kind[:count] for kind in kinds.values() if len(kind) >= count), None)
        if chosen is None:
            raise ReplicaError(_no_room(gpus, room, share=share, count=count))
        self._claims[server] = _Claim(bytes_of={gpu.uuid: need_bytes(gpu, share) for gpu in chosen})
        return sorted(chosen, key=lambda gpu: gpu.index)

    def might_fit(self, gpus: Sequence[Gpu], *, share: float, count: int) -> bool:
        """Whether there would be room if nobody but our servers held memory."""
        fit = [
            gpu.name
            for gpu in gpus
            if gpu.fault is None and gpu.total_bytes - self._claimed_bytes(gpu) >= need_bytes(gpu, share)
        ]
        return any(fit.count(name) >= count for name in fit)

    def loaded(self, server: str) -> None:
        """The server answers: what its GPUs hold of it is there from now on."""
        self._claims[server].loading = False

    def give_back(self, server: str) -> None:
        """The server has ended; one that has no claim is fine."""
        self._claims.pop(server, None)

    def _room_bytes(self, gpu: Gpu) -> int:
        used_bytes, claimed_bytes = gpu.total_bytes - gpu.free_bytes, self._claimed_bytes(gpu)
        others_bytes = max(0, used_bytes - claimed_bytes)
        if any(claim.loading for claim in self._on(gpu)):
            others_bytes = max(others_bytes, min(self._others_bytes.get(gpu.uuid, 0), used_bytes))
        self._others_bytes[gpu.uuid] = others_bytes
        return min(gpu.free_bytes, gpu.total_bytes - others_bytes - claimed_bytes)

    def _claimed_bytes(self, gpu: Gpu) -> int:
        return sum(claim.bytes_of[gpu.uuid] for claim in self._on(gpu))

    def _servers_on(self, gpu: Gpu) -> int:
        return sum(1 for _ in self._on(gpu))

    def _on(self, gpu: Gpu) -> Iterator[_Claim]:
        return (claim for claim in self._claims.values() if gpu.uuid in claim.bytes_of)


def need_bytes(gpu: Gpu, share: float) -> int:
    """What a server with that share takes of the GPU, at most."""
    return int(share * gpu.total_bytes) + CONTEXT_BYTES


def _no_room(gpus: Sequence[Gpu], room: dict[int, int], *, share: float, count: int) -> str:
    found = "; ".join(
        f"{gpu} cannot be used: {gpu.fault}"
        if gpu.fault is not None
        else f"{gpu} has {max(0, room[gpu.index]) / _GIB:.1f} GiB left of {gpu.total_bytes / _GIB:.1f}, "
        f"{need_bytes(gpu, share) / _GIB:.1f} are needed"
        for gpu in gpus
    )
    wanted = "a GPU" if count == 1 else f"{count} GPUs of one kind"
    return (
        f"there is no room on {wanted} for a share of {share:g}: {found or 'no GPU is left'}. "
        "End a replica or whatever else holds the memory, or lower gpu_memory_utilization."
    )

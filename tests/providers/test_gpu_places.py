"""Where servers are placed on GPUs, over all that can happen to the memory there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.errors import ReplicaError
from swarmx.providers.gpu_places import CONTEXT_BYTES, GpuPlaces, need_bytes
from swarmx.providers.gpus import Gpu
from tests.providers.gpu_stand_in import GIB, gpu, numbers


@dataclass
class World:
    """GPUs that others hold a part of, in bytes, and our servers, which load bit by bit."""

    gpus: list[Gpu]
    others: dict[str, int]
    places: GpuPlaces = field(default_factory=GpuPlaces)
    claims: dict[str, dict[str, int]] = field(default_factory=dict)  # by server and UUID
    loaded: dict[str, float] = field(default_factory=dict)  # the part that a server has taken of its claim

    def claimed(self, uuid: str) -> int:
        return sum(claim.get(uuid, 0) for claim in self.claims.values())

    def seen(self) -> list[Gpu]:
        """As NVML has it."""
        held = {
            gpu.uuid: self.others[gpu.uuid]
            + sum(int(self.loaded[server] * claim.get(gpu.uuid, 0)) for server, claim in self.claims.items())
            for gpu in self.gpus
        }
        return [replace(gpu, free_bytes=gpu.total_bytes - held[gpu.uuid]) for gpu in self.gpus]

    def fits(self, share: float, count: int) -> bool:
        kinds = [
            gpu.name
            for gpu in self.gpus
            if gpu.fault is None
            and gpu.total_bytes - self.others[gpu.uuid] - self.claimed(gpu.uuid) >= need_bytes(gpu, share)
        ]
        return any(kinds.count(kind) >= count for kind in kinds)

    def quiet(self, uuid: str) -> bool:
        return all(self.loaded[server] == 1.0 for server, claim in self.claims.items() if uuid in claim)

    def take(self, server: str, share: float, count: int) -> None:
        could = self.fits(share, count)
        assert self.places.might_fit(self.seen(), share=share, count=count) or not could
        try:
            chosen = self.places.take(server, self.seen(), share=share, count=count)
        except ReplicaError as error:
            assert not could, error  # noqa: PT017  # whether it is right depends on the world
            return
        assert could
        assert len({gpu.uuid for gpu in chosen}) == count
        assert numbers(chosen) == sorted(numbers(chosen))
        assert len({gpu.name for gpu in chosen}) == 1
        assert all(gpu.fault is None for gpu in chosen)
        self.claims[server] = {gpu.uuid: need_bytes(gpu, share) for gpu in chosen}
        self.loaded[server] = 0.0


@st.composite
def hosts(draw: st.DrawFn) -> World:
    gpus = [
        Gpu(
            index=index,
            uuid=f"GPU-{index}",
            name=draw(st.sampled_from(["NVIDIA H100", "NVIDIA L40S"])),
            total_bytes=draw(st.sampled_from([24 * GIB, 80 * GIB])),
            free_bytes=0,
            fault=draw(st.sampled_from([None, None, None, "it is split"])),
        )
        for index in range(draw(st.integers(1, 4)))
    ]
    return World(gpus=gpus, others={gpu.uuid: draw(st.integers(0, gpu.total_bytes)) for gpu in gpus})


@given(world=hosts(), data=st.data())
def test_no_gpu_is_ever_given_away_twice_and_nobody_is_refused_whom_there_is_room_for(
    world: World, data: st.DataObject
) -> None:
    for step in range(data.draw(st.integers(1, 25))):
        servers = sorted(world.claims)
        match data.draw(st.sampled_from(["take", "take", "load", "end", "others"])):
            case "take":
                share = data.draw(st.sampled_from([0.1, 0.3, 0.4, 0.5, 0.9]))
                world.take(f"s{step}", share, data.draw(st.integers(1, 3)))
            case "load" if servers:
                server = data.draw(st.sampled_from(servers))
                world.loaded[server] = max(world.loaded[server], data.draw(st.sampled_from([0.2, 0.7, 1.0])))
                if world.loaded[server] == 1.0:
                    world.places.loaded(server)
            case "end" if servers:
                server = data.draw(st.sampled_from(servers))
                world.places.give_back(server)
                world.places.give_back(server)
                del world.claims[server], world.loaded[server]
            case "others":
                chosen = data.draw(st.sampled_from(world.gpus))
                if world.quiet(chosen.uuid):
                    room = chosen.total_bytes - world.claimed(chosen.uuid)
                    world.others[chosen.uuid] = data.draw(st.integers(0, max(0, room)))
            case _:
                pass
        for found in world.gpus:
            assert world.others[found.uuid] + world.claimed(found.uuid) <= found.total_bytes


@given(world=hosts(), order=st.permutations(range(4)))
def test_the_same_facts_give_the_same_place_in_whatever_order_they_come(world: World, order: list[int]) -> None:
    seen = world.seen()
    shuffled = [seen[i] for i in order if i < len(seen)]

    def placed(gpus: list[Gpu]) -> list[int]:
        try:
            return numbers(GpuPlaces().take("s", gpus, share=0.3, count=2))
        except ReplicaError:
            return []

    assert placed(seen) == placed(seen)
    if len({found.name for found in seen}) == 1:
        assert placed(seen) == placed(shuffled)


def test_a_server_goes_where_the_fewest_others_are_then_where_the_most_room_is() -> None:
    places = GpuPlaces()
    gpus = [gpu(0, free=40), gpu(1), gpu(2)]
    assert numbers(places.take("a", gpus, share=0.4, count=1)) == [1]
    assert numbers(places.take("b", gpus, share=0.4, count=1)) == [2]
    assert numbers(places.take("c", gpus, share=0.4, count=1)) == [0]
    assert numbers(places.take("d", gpus, share=0.4, count=1)) == [1]
    places.give_back("b")
    assert numbers(places.take("e", gpus, share=0.4, count=1)) == [2]


def test_a_model_that_is_spread_gets_gpus_of_one_kind() -> None:
    gpus = [gpu(0, name="NVIDIA L40S", total=48), gpu(1, total=40), gpu(2, total=40)]
    assert numbers(GpuPlaces().take("a", gpus, share=0.9, count=2)) == [1, 2]
    with pytest.raises(ReplicaError, match="3 GPUs of one kind"):
        GpuPlaces().take("a", gpus, share=0.9, count=3)


def test_what_a_loading_server_has_not_taken_yet_is_not_given_away_and_what_it_has_is_not_counted_twice() -> None:
    places = GpuPlaces()
    places.take("a", [gpu(0, free=60)], share=0.3, count=1)  # others hold 20 of 80, a will hold 24.5
    with pytest.raises(ReplicaError, match=r"has 35\.5 GiB left of 80\.0, 40\.5 are needed"):
        places.take("b", [gpu(0, free=60)], share=0.5, count=1)
    places.take("b", [gpu(0, free=40)], share=0.4, count=1)  # a holds 20 by now


def test_without_room_the_error_names_what_each_gpu_has_and_would_need() -> None:
    gpus = [gpu(0, free=10), gpu(1, total=0, name="unknown", fault="NVML says: GPU is lost")]
    with pytest.raises(
        ReplicaError,
        match=r"no room on a GPU for a share of 0\.9: GPU 0 \(NVIDIA H100\) has 10\.0 GiB left of 80\.0, "
        r"72\.5 are needed; GPU 1 \(unknown\) cannot be used: NVML says: GPU is lost\. .*gpu_memory_utilization",
    ):
        GpuPlaces().take("a", gpus, share=0.9, count=1)


def test_only_others_can_be_waited_for() -> None:
    places = GpuPlaces()
    full = [gpu(0, free=10)]
    assert places.might_fit(full, share=0.5, count=1)
    places.take("a", [gpu(0)], share=0.6, count=1)
    assert not places.might_fit(full, share=0.5, count=1)


def test_a_share_comes_with_what_cuda_needs_itself() -> None:
    assert need_bytes(gpu(0), 0.5) == 40 * GIB + CONTEXT_BYTES
    with pytest.raises(ReplicaError):
        GpuPlaces().take("a", [gpu(0)], share=1.0, count=1)

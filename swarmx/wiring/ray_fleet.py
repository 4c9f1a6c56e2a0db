"""The part of the fleet that runs on a Ray cluster: which programs its nodes start for the elastic groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swarmx.config import ElasticReplicas, Settings
from swarmx.core.errors import ConfigError
from swarmx.core.messages import Message
from swarmx.core.nouns import ReplicaGroup
from swarmx.providers.emulated.provider import EmulatedGroup, EmulatedSpec, arguments, loading
from swarmx.providers.ray.provider import RayGroup, RayProvider
from swarmx.providers.ray.wire import Engine, Place
from swarmx.providers.tool_replicas import TOKEN_VARIABLE, read_pool, secrets_of
from swarmx.providers.vllm_command import ORDER_ARGUMENTS
from swarmx.runtime.clock import Clock
from swarmx.runtime.fleet import Fleet
from swarmx.wiring.fleet import emulated_profile

_PLACED_S = 120.0  # until an actor has its process on a node that is busy
_VLLM_START_S = 900.0
# As in scripts/vllm/serve.sh: part of a prompt of a request with a seed would end a CPU engine.
_VLLM_ON_CPU = (
    *("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--max-num-seqs", "8"),
    *("--enforce-eager", "--no-enable-chunked-prefill"),
)


def ray_provider(
    settings: Settings, *, clock: Clock, post: Callable[[Message], None], on_lost: Callable[[str], None]
) -> RayProvider | None:
    """Who runs the elastic replicas on Ray, if they are to run there. Raises ConfigError."""
    wanted = settings.ray
    if wanted.address is None or not settings.elastic:
        return None
    return RayProvider(
        address=wanted.address,
        namespace=wanted.namespace,
        groups={entry.group_id: _group(entry, settings) for entry in settings.elastic},
        clock=clock,
        post=post,
        on_lost=on_lost,
        kept=wanted.keep,
        orphan_s=wanted.orphan_s,
    )


async def take_over(provider: RayProvider, fleet: Fleet, groups: Sequence[ReplicaGroup]) -> None:
    """Have the fleet go on with what an earlier life left on Ray. Raises ReplicaError when Ray cannot be reached."""
    known = {group.group_id: group for group in groups}
    for replica in await provider.start():
        fleet.adopt(replica, known[provider.group_of(replica.replica_id)])


def _group(entry: ElasticReplicas, settings: Settings) -> RayGroup:
    return RayGroup(engine=_engine(entry, settings), place=Place(resources=entry.resources, labels=entry.labels))


def _engine(entry: ElasticReplicas, settings: Settings) -> Engine:
    match entry.provider:
        case "emulated":
            return _emulated(entry, settings)
        case "tools" if entry.file is not None:
            pool = read_pool(entry.file)
            argv = ("{python}", "-m", "swarmx.providers.tools", "--config", str(pool.file), "--exit-with-parent")
            return Engine(
                argv=argv,
                env=secrets_of(pool.settings),
                token_variable=TOKEN_VARIABLE,
                start_s=pool.start_s + _PLACED_S,
            )
        case "process" if entry.folder is not None:
            folder = str(entry.folder.absolute())
            if entry.on_gpus:  # which GPUs is for Ray to say, by the resources of the group
                words = entry.gpu_serving.arguments(folder, entry.model, "{port}", entry.engine_order)
                return Engine(argv=(entry.command, *words), env={}, start_s=_VLLM_START_S)
            serve = ("vllm", "serve", folder, "--served-model-name", entry.model, "--host", "127.0.0.1")
            return Engine(
                argv=(*serve, "--port", "{port}", *ORDER_ARGUMENTS[entry.engine_order], *_VLLM_ON_CPU),
                env=_cpu_environment(entry.resources.get("CPU", 1.0)),
                start_s=_VLLM_START_S,
            )
        case _:
            raise ConfigError(f'elastic: provider = "{entry.provider}" does not run on Ray yet; leave --on out.')


def _cpu_environment(cores: float) -> dict[str, str]:
    """By itself vLLM would take nearly all memory of the node, and compute on the same core as its neighbours."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(cores))),
        "VLLM_NO_USAGE_STATS": "1",
    }


def _emulated(entry: ElasticReplicas, settings: Settings) -> Engine:
    group = EmulatedGroup(profile=emulated_profile(entry), size_class=entry.size_class, start_s=entry.start_s)
    spec = EmulatedSpec(
        replica_id="",
        model=entry.model,
        kind=entry.kind,
        device=entry.device,
        profile=group.profile,
        size_class=entry.size_class,
        engine_order=entry.engine_order,
    )
    scale = settings.emulation.time_scale
    options = arguments(spec, time_scale=scale, seed=settings.emulation.seed)
    return Engine(
        argv=("{python}", "-m", "swarmx.providers.emulated", *options, *loading(group)),
        start_s=group.start_s / scale + _PLACED_S,
    )

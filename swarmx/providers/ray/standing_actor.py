"""Small actors that stand for themselves: found by name, made by whoever asks first, and outliving that."""

from __future__ import annotations

from typing import Any


def standing_actor(kind: type, name: str, namespace: str) -> Any:
    """The actor of this name, made if there is none yet; it takes no CPU, and many calls at a time.

    Blocks; raises Ray's errors.
    """
    import ray

    return (
        ray.remote(kind)
        .options(
            name=name,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=1000,
            num_cpus=0,
        )
        .remote()
    )

"""SwarmX inside Ray Serve: names for a Serve config file, found only when they are asked for, since they need Ray."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "Router": "swarmx.compat.ray_serve.router",
    "ScalePolicy": "swarmx.compat.ray_serve.scale_policy",
    "retrying": "swarmx.compat.ray_serve.retrying",
    "idempotency_key": "swarmx.compat.ray_serve.retrying",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_WHERE)}")
    return getattr(import_module(_WHERE[name]), name)

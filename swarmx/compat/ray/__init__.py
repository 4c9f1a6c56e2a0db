"""An existing Ray program's tasks and actors, with SwarmX's router choosing where each call runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {"routed": "swarmx.compat.ray.routing", "RoutingOptions": "swarmx.compat.ray.options"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_WHERE)}")
    return getattr(import_module(_WHERE[name]), name)

"""Where on a Ray cluster a replica can go, and by which names its actors are found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swarmx.core.errors import ConfigError
from swarmx.providers.ray.wire import Place

REPLICA = "replica:"
LOOKOUT = "lookout"
_SCHEME = "ray://"
_LESS = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is up: all that it has, taken or not, and its labels. One that `is_leaving` takes nothing new."""

    node_id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    is_leaving: bool = False


def address_of(on: str) -> str:
    """What Ray calls the cluster of `--on`: `ray://auto` and `HOST:PORT` are joined as a node of it, `ray://HOST:PORT`
    is a Ray Client server. Raises ConfigError."""
    bare = on.removeprefix(_SCHEME)
    if bare == "auto":
        return "auto"
    host, _, port = bare.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{on!r} is no address of a Ray cluster: write ray://auto, ray://HOST:PORT or HOST:PORT.")
    return on


def actor_options(place: Place) -> dict[str, Any]:
    """The place in the words of `ray.remote(...).options`."""
    rest = dict(place.resources)
    options: dict[str, Any] = {"num_cpus": rest.pop("CPU", 0.0), "num_gpus": rest.pop("GPU", 0.0)}
    if (memory := rest.pop("memory", None)) is not None:
        options["memory"] = memory
    if rest:
        options["resources"] = rest
    if place.labels:
        options["label_selector"] = dict(place.labels)
    return options


def misfit(place: Place, nodes: Iterable[Node]) -> str | None:
    """Why no node could ever take the replica, however idle; None where one could."""
    nodes = [node for node in nodes if not node.is_leaving]
    labelled = [node for node in nodes if all(node.labels.get(k) == v for k, v in place.labels.items())]
    if place.labels and not labelled:
        return f"none of the {len(nodes)} nodes has the labels {dict(place.labels)}"
    for node in labelled:
        if all(node.resources.get(name, 0.0) >= amount - _LESS for name, amount in place.resources.items()):
            return None
    most = {name: max((node.resources.get(name, 0.0) for node in labelled), default=0.0) for name in place.resources}
    return f"a replica takes {dict(place.resources)}, and the most that a node has is {most}"

"""`routed`: over a `ray.remote` function or around a list of actors; `.remote()` gives Ray's reference as before.

For a function, the router picks the node; for a method of actors, the actor. The rest of the program stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from swarmx.compat.ray.desk import Desk
from swarmx.compat.ray.options import RoutingOptions
from swarmx.core.errors import ConfigError

_PLACED = ("scheduling_strategy", "label_selector", "fallback_strategy")  # with these, the program itself says where


def routed(**keywords: Any) -> Callable[[Any], Any]:
    """A decorator; its keywords are those of `RoutingOptions`. Raises ConfigError."""
    unknown = keywords.keys() - set(RoutingOptions.__dataclass_fields__)
    if unknown:
        known = ", ".join(RoutingOptions.__dataclass_fields__)
        raise ConfigError(f"routed has no {', '.join(sorted(unknown))}; it has {known}.")
    options = RoutingOptions(**keywords)

    def over(wanted: Any) -> Any:
        if hasattr(wanted, "_function") and hasattr(wanted, "remote"):
            return RoutedFunction(wanted, options)
        actors = list(wanted) if isinstance(wanted, Iterable) else []
        if actors and all(hasattr(actor, "_actor_id") for actor in actors):
            return RoutedActors(actors, options)
        raise ConfigError(f"routed needs a ray.remote function or a list of actors, and got {wanted!r:.80}.")

    return over


class RoutedFunction:
    """A remote function whose calls go to the node where they are forecast to end first.

    A node takes as many at a time as its resources allow. Ray may run a call elsewhere when its node is lost.
    """

    def __init__(self, function: Any, options: RoutingOptions, desk: Desk | None = None) -> None:
        self._remote_function = function
        self._options = options
        name = options.model or function._function.__name__
        self.desk = desk or Desk(name, options, self._nodes)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """As Ray's: a reference at once."""
        return self._send({}, args, kwargs)

    def options(self, **options: Any) -> Any:
        """As Ray's. With options that say where the call is to run, Ray sees to it, and SwarmX does not."""
        changed = self._remote_function.options(**options)
        if any(name in options for name in _PLACED):
            return changed
        outer = self

        class Changed:
            def remote(self, *args: Any, **kwargs: Any) -> Any:
                return outer._send(options, args, kwargs)

        return Changed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote_function, name)

    def __reduce__(self) -> Any:
        """In another process it is Ray's own function: what was learnt is here."""
        return _itself, (self._remote_function,)

    def _send(self, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sent = None
        if not any(self._defaults().get(name) for name in _PLACED):
            sent = self.desk.place(self._remote_function._function.__name__, args, kwargs)
        if sent is None:
            return self._remote_function.options(**options).remote(*args, **kwargs)
        where = NodeAffinitySchedulingStrategy(sent.place, soft=True)
        try:
            ref = self._remote_function.options(**options, scheduling_strategy=where).remote(*args, **kwargs)
        except BaseException:
            self.desk.not_sent(sent)
            raise
        self.desk.follow(sent, ref)
        return ref

    def _defaults(self) -> dict[str, Any]:
        found: dict[str, Any] = getattr(self._remote_function, "_default_options", {})
        return found

    def _nodes(self) -> dict[str, int]:
        return slots_of_nodes(ray.nodes(), needs_of(self._defaults()), leaving=set(state.get_draining_nodes()))


class RoutedActors:
    """Actors of one class whose methods are called on the one where the call is forecast to end first."""

    def __init__(self, actors: Sequence[Any], options: RoutingOptions) -> None:
        self._actors = {actor._actor_id.hex(): actor for actor in actors}
        self._turns = itertools.cycle(actors)
        name = options.model or actors[0]._ray_actor_creation_function_descriptor.class_name
        self.desk = Desk(
            name,
            options,
            lambda: dict.fromkeys(self._actors, options.slots),
            on_gone=lambda place: self._actors.pop(place, None),
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        getattr(next(iter(self._actors.values()), next(self._turns)), name)  # raises as Ray does for what is not there
        return RoutedMethod(self, name)


class RoutedMethod:
    """One method of a pool of actors."""

    def __init__(self, pool: RoutedActors, name: str, options: dict[str, Any] | None = None) -> None:
        self._pool = pool
        self._name = name
        self._options = options or {}

    def options(self, **options: Any) -> RoutedMethod:
        """As Ray's."""
        return RoutedMethod(self._pool, self._name, {**self._options, **options})

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """As Ray's: a reference at once. Without SwarmX, actors take turns."""
        desk, actors = self._pool.desk, self._pool._actors
        sent = desk.place(self._name, args, kwargs)
        actor = next(self._pool._turns) if sent is None else actors[sent.place]
        method = getattr(actor, self._name)
        try:
            ref = (method.options(**self._options) if self._options else method).remote(*args, **kwargs)
        except BaseException:
            if sent is not None:
                desk.not_sent(sent)
            raise
        if sent is not None:
            desk.follow(sent, ref)
        return ref


def needs_of(options: Mapping[str, Any]) -> dict[str, float]:
    """What one call of a function takes of its node, from its options."""
    cpus = options.get("num_cpus")
    needs = {"CPU": 1.0 if cpus is None else float(cpus), "GPU": float(options.get("num_gpus") or 0.0)}
    if options.get("memory"):
        needs["memory"] = float(options["memory"])
    needs |= {name: float(amount) for name, amount in (options.get("resources") or {}).items()}
    return {name: amount for name, amount in needs.items() if amount > 0.0}


def slots_of_nodes(
    rows: Iterable[Mapping[str, Any]], needs: Mapping[str, float], *, leaving: set[str]
) -> dict[str, int]:
    """How many calls each node that is up and stays can run at a time; nodes that cannot run one are left out."""
    found = {}
    for row in rows:
        if not row["Alive"] or row["NodeID"] in leaving:
            continue
        shares = [row["Resources"].get(name, 0.0) / amount for name, amount in needs.items()]
        slots = int(min(shares, default=1000.0) + 1e-9)
        if slots >= 1:
            found[row["NodeID"]] = slots
    return found


def _itself(function: Any) -> Any:
    return function

"""How long the nodes of image graphs take on each server, learnt from those that ran; and so whole graphs, ahead."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from operator import mul

import numpy as np

from swarmx.core.forecast import LEVELS, Forecast, Source
from swarmx.neural.heads.comfy_nodes import NodeWork

MOST_KEYS = 4096
MOST_SERVERS = 256
_KEEP = 0.98
_LEAST_S, _MOST_S = 0.01, 86_400.0
_RATE = 0.1
_GUESS = 5e-4  # as many runs count as much as the guess of a line
_USUAL_SPREAD, _USUAL_COUNT = 0.6, 8
_RECENT = 200
_SURE = 3.0
_SAMPLER_S, _PIXELS_S, _OTHER_S, _LOAD_S = 0.4, 0.3, 0.02, 3.0

_NORMAL = (-1.6449, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449, 2.3263)
"""Quantiles of the standard normal distribution at LEVELS."""
_USUAL = tuple(_USUAL_SPREAD * score for score in _NORMAL)


@dataclass(slots=True)
class _Line:
    """Seconds as a sum of amounts, each times a cost that is not negative: least squares of relative errors, where
    what was seen long ago counts less."""

    gram: np.ndarray
    right: np.ndarray
    count: int = 0
    costs: tuple[float, ...] | None = None

    def add(self, amounts: np.ndarray, seconds: float) -> None:
        weighted = amounts / max(seconds, _LEAST_S)
        self.gram *= _KEEP
        self.right *= _KEEP
        self.gram += np.outer(weighted, weighted)
        self.right += weighted * (seconds / max(seconds, _LEAST_S))
        self.count += 1
        self.costs = None

    def seconds(self, amounts: Sequence[float]) -> float:
        if self.costs is None:
            self.costs = tuple(_not_negative(self.gram, self.right).tolist())
        return _seconds(self.costs, amounts)


@dataclass(slots=True)
class _Server:
    """A server against the others: the logarithm of its factor for all nodes, and for each kind what that leaves."""

    factor: float = 0.0
    seen: int = 0
    own: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    errors: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    spread: Sequence[float] | None = None


class NodeCosts:
    """Learns seconds of nodes by (class, weights) over all servers, and how each server differs.

    A class of node costs a constant and so much for each of its amounts (see NodeWork); servers multiply that. So a
    graph of any size is known on all servers once its classes ran on one of them in a few sizes. A class that never ran
    is guessed. How far whole graphs were off becomes the spread of the next forecast.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[tuple[str, str], _Line] = OrderedDict()
        self._servers: OrderedDict[str, _Server] = OrderedDict()

    def observe(self, server: str, work: NodeWork, seconds: float) -> None:
        """A node took so many seconds on a server. What is below zero, or above a day, is no observation."""
        if not 0.0 <= seconds <= _MOST_S:
            return
        known, key = self._server(server), (work.class_type, work.model)
        before = self._lines.get(key)
        if before is not None and before.count >= 2 and seconds >= _LEAST_S:
            off = math.log(seconds / max(self._common_s(work), _LEAST_S)) - known.factor
            own, count = known.own.get(key, (0.0, 0))
            if len(known.own) < MOST_KEYS or key in known.own:
                known.own[key] = (own + max(_RATE, 1.0 / (count + 1)) * (off - own), count + 1)
            known.factor += max(_RATE / 4, 1.0 / (known.seen + 4)) * off
            known.seen += 1
        line = self._lines.pop(key, None) or _new_line(work)
        self._lines[key] = line
        if len(self._lines) > MOST_KEYS:
            self._lines.popitem(last=False)
        line.add(np.array((1.0, *work.amounts)), seconds * math.exp(-known.factor))

    def observe_graph(self, server: str, expected_s: float, seconds: float) -> None:
        """A graph that should have taken `expected_s` took `seconds`."""
        if 0.0 < expected_s <= _MOST_S and 0.0 < seconds <= _MOST_S:
            known = self._server(server)
            known.errors.append(math.log(seconds / expected_s))
            known.spread = None

    def seconds(self, server: str, work: NodeWork) -> float:
        """What a node should take on a server."""
        common_s, known = self._common_s(work), self._servers.get(server)
        if known is None:
            return common_s
        own, count = known.own.get((work.class_type, work.model), (0.0, 0))
        return common_s * math.exp(known.factor + own * count / (count + _SURE))

    def forecast(self, server: str, works: Iterable[NodeWork]) -> Forecast:
        """Seconds of all these nodes, one after the other, on a server; leave out what it has cached."""
        expected_s = min(max(sum(self.seconds(server, work) for work in works), _LEAST_S / 10), _MOST_S)
        known = self._servers.get(server)
        quantiles = tuple(expected_s * math.exp(value) for value in self._spread(known))
        source: Source = "empirical" if known is not None and known.errors else "prior"
        return Forecast(levels=LEVELS, quantiles=quantiles, unit="s", source=source, version="node-costs")

    def _spread(self, known: _Server | None) -> Sequence[float]:
        """Quantiles [LEVELS] of log errors: those seen, mixed with a wide guess that counts as a few graphs."""
        if known is None or not known.errors:
            return _USUAL
        if known.spread is None:
            share = len(known.errors) / (len(known.errors) + _USUAL_COUNT)
            mixed = share * np.quantile(known.errors, LEVELS) + (1.0 - share) * np.array(_USUAL)
            known.spread = np.maximum.accumulate(mixed).tolist()
        return known.spread

    def _common_s(self, work: NodeWork) -> float:
        line = self._lines.get((work.class_type, work.model))
        return _seconds(_guess(work), work.amounts) if line is None else line.seconds(work.amounts)

    def _server(self, name: str) -> _Server:
        known = self._servers.setdefault(name, _Server())
        self._servers.move_to_end(name)
        if len(self._servers) > MOST_SERVERS:
            self._servers.popitem(last=False)
        return known


def _seconds(costs: Sequence[float], amounts: Sequence[float]) -> float:
    """The first cost is the constant."""
    return costs[0] + sum(map(mul, costs[1:], amounts), 0.0)


def _guess(work: NodeWork) -> tuple[float, ...]:
    """The costs of a node that never ran."""
    if len(work.amounts) == 3:
        return _OTHER_S, _OTHER_S, _SAMPLER_S, _SAMPLER_S / 4
    if work.amounts:
        return _OTHER_S, *[_PIXELS_S] * len(work.amounts)
    return (_LOAD_S if work.model else _OTHER_S,)


def _new_line(work: NodeWork) -> _Line:
    """One that knows a guess, which the first run outweighs."""
    guess = np.array(_guess(work))
    gram = np.diag(_GUESS / guess**2)
    return _Line(gram=gram, right=gram @ guess)


def _not_negative(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """argmin x' gram x / 2 - right' x with x >= 0, by trying all sets of entries that may be above zero: few are."""
    size = len(right)
    best: np.ndarray = np.linalg.solve(gram + 1e-12 * np.trace(gram) * np.eye(size), right)
    if (best >= 0.0).all():
        return best
    best, best_value = np.zeros(size), 0.0
    for count in range(size - 1, 0, -1):
        for chosen in combinations(range(size), count):
            index = np.array(chosen)
            part = gram[np.ix_(index, index)]
            found = np.linalg.solve(part + 1e-12 * np.trace(part) * np.eye(count), right[index])
            value = -0.5 * float(right[index] @ found)
            if (found >= 0.0).all() and value < best_value:
                best, best_value = np.zeros(size), value
                best[index] = found
    return best

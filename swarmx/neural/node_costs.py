"""How long the nodes of image graphs take on each server, learnt from those that ran; and so whole graphs, ahead."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from operator import mul
from typing import Annotated, Self

import msgspec
import numpy as np

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import LEVELS, Forecast, Source
from swarmx.neural.heads.comfy_nodes import NodeWork

MOST_KEYS = 4096
MOST_SERVERS = 256
_KEEP = 0.98
_LEAST_S, _MOST_S = 0.01, 86_400.0
_RATE = 0.1
_GUESS = 5e-4  # as many runs count as much as the guess of a line
_USUAL = tuple(0.6 * score for score in (-1.65, -0.4, 0.4, 1.65))
"""Errors that stand for those of before a server's first graph."""
_RECENT = 100
_MOST_OFF = math.log(4.0)
"""Of one node or graph: a few that stood still must not make a server look hopeless, which then runs none that would
tell."""
_FORMAT = 1
_MOST_COSTS = 8
_Exponent = Annotated[float, msgspec.Meta(ge=-50.0, le=50.0)]
_SURE = 3.0
_SAMPLER_S, _PIXELS_S, _OTHER_S, _LOAD_S = 0.4, 0.3, 0.02, 3.0


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
            self.costs = _not_negative(self.gram, self.right)
        return _seconds(self.costs, amounts)


@dataclass(slots=True)
class _Server:
    """A server against the others: the logarithm of its factor for all nodes, and for each kind what that leaves."""

    factor: float = 0.0
    seen: int = 0
    own: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    graphs: int = 0
    errors: deque[float] = field(default_factory=lambda: deque(_USUAL, maxlen=_RECENT))
    spread: Sequence[float] | None = None


class _KeptLine(msgspec.Struct, frozen=True, kw_only=True):
    class_type: str
    model: str
    gram: list[list[float]]
    right: list[float]
    count: Annotated[int, msgspec.Meta(ge=0)]

    def read(self) -> _Line:
        size = len(self.right)
        if not 1 <= size <= _MOST_COSTS or len(self.gram) != size or any(len(row) != size for row in self.gram):
            raise PredictorError(f"costs of {self.class_type!r} have {size} amounts and a table of another size")
        gram, right = np.array(self.gram), np.array(self.right)
        if not (np.isfinite(gram).all() and np.isfinite(right).all() and (gram.diagonal() > 0.0).all()):
            raise PredictorError(f"costs of {self.class_type!r} are no sums of squares")
        return _Line(gram=gram, right=right, count=self.count)


class _KeptServer(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    factor: _Exponent
    seen: Annotated[int, msgspec.Meta(ge=0)]
    own: list[tuple[str, str, _Exponent, Annotated[int, msgspec.Meta(ge=0)]]]
    graphs: Annotated[int, msgspec.Meta(ge=0)]
    errors: Annotated[list[_Exponent], msgspec.Meta(min_length=1)]

    def read(self) -> _Server:
        own = {(name, model): (off, count) for name, model, off, count in self.own[:MOST_KEYS]}
        errors = deque(self.errors, maxlen=_RECENT)
        return _Server(factor=self.factor, seen=self.seen, own=own, graphs=self.graphs, errors=errors)


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    lines: list[_KeptLine]
    servers: list[_KeptServer]


class NodeCosts:
    """Learns seconds of nodes by (class, weights, how many amounts) over all servers, and how each server differs.

    A class of node costs a constant and so much for each of its amounts (see NodeWork); servers multiply that. So a
    graph of any size is known on all servers once its classes ran on one of them in a few sizes. A class that never ran
    is guessed. How far whole graphs were off of late becomes the spread of the next forecast: a graph counts `fade` of
    the one after it, and (what was known then / what is known now) ** `learning`, in graphs.
    """

    def __init__(self, *, fade: float = 0.98, learning: float = 2.0) -> None:
        self._fade = fade
        self._learning = learning
        self._lines: OrderedDict[tuple[str, str, int], _Line] = OrderedDict()
        self._servers: OrderedDict[str, _Server] = OrderedDict()

    def observe(self, server: str, work: NodeWork, seconds: float) -> None:
        """A node took so many seconds on a server. What is below zero, or above a day, is no observation."""
        if not 0.0 <= seconds <= _MOST_S:
            return
        known, key, line_key = self._server(server), (work.class_type, work.model), _line_key(work)
        before = self._lines.get(line_key)
        if before is not None and before.count >= 2 and seconds >= _LEAST_S:
            off = _bounded(math.log(seconds / max(self._common_s(work), _LEAST_S)) - known.factor)
            own, count = known.own.get(key, (0.0, 0))
            if len(known.own) < MOST_KEYS or key in known.own:
                known.own[key] = (own + max(_RATE, 1.0 / (count + 1)) * (off - own), count + 1)
            known.factor += max(_RATE / 4, 1.0 / (known.seen + 4)) * off
            known.seen += 1
        line = self._lines.pop(line_key, None) or _new_line(work)
        self._lines[line_key] = line
        if len(self._lines) > MOST_KEYS:
            self._lines.popitem(last=False)
        line.add(np.array((1.0, *work.amounts)), seconds * math.exp(-known.factor))

    def observe_graph(self, server: str, expected_s: float, seconds: float) -> None:
        """A graph that should have taken `expected_s` took `seconds`."""
        if 0.0 < expected_s <= _MOST_S and 0.0 < seconds <= _MOST_S:
            known = self._server(server)
            known.errors.append(_bounded(math.log(seconds / expected_s)))
            known.graphs += 1
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
        known = self._servers.get(server) or _Server()
        if known.spread is None:
            known.spread = self._quantiles(known)
        quantiles = tuple(expected_s * math.exp(value) for value in known.spread)
        source: Source = "empirical" if known.graphs else "prior"
        return Forecast(levels=LEVELS, quantiles=quantiles, unit="s", source=source, version="node-costs")

    def dumped(self) -> bytes:
        """All that was learnt, as JSON: for `loaded`."""
        lines = [
            _KeptLine(
                class_type=key[0], model=key[1], gram=line.gram.tolist(), right=line.right.tolist(), count=line.count
            )
            for key, line in self._lines.items()
        ]
        servers = [
            _KeptServer(
                name=name,
                factor=known.factor,
                seen=known.seen,
                own=[(*key, off, count) for key, (off, count) in known.own.items()],
                graphs=known.graphs,
                errors=list(known.errors),
            )
            for name, known in self._servers.items()
        ]
        return msgspec.json.encode(_Kept(format=_FORMAT, lines=lines, servers=servers))

    @classmethod
    def loaded(cls, raw: bytes) -> Self:
        """What was dumped. Raises PredictorError for what was not."""
        try:
            kept = msgspec.json.decode(raw, type=_Kept)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PredictorError(f"these are no costs of nodes: {error}") from None
        if kept.format != _FORMAT:
            raise PredictorError(f"costs of nodes have the format {kept.format}, this version knows {_FORMAT}")
        costs = cls()
        for line in kept.lines[-MOST_KEYS:]:
            costs._lines[line.class_type, line.model, len(line.right) - 1] = line.read()
        for server in kept.servers[-MOST_SERVERS:]:
            costs._servers[server.name] = server.read()
        return costs

    def _common_s(self, work: NodeWork) -> float:
        line = self._lines.get(_line_key(work))
        return _seconds(_guess(work), work.amounts) if line is None else line.seconds(work.amounts)

    def _quantiles(self, known: _Server) -> Sequence[float]:
        """Quantiles [LEVELS] of a server's last errors. Each counts for less than the next: those of long ago say
        nothing of a server that has changed, and those of when little was known nothing of what is known now."""
        ago = np.arange(len(known.errors) - 1, -1, -1.0)
        weights = self._fade**ago * (1.0 - ago / (known.graphs + len(_USUAL))) ** self._learning
        order = np.argsort(known.errors)
        middles = np.cumsum(weights[order]) - 0.5 * weights[order]
        found: list[float] = np.interp(LEVELS, middles / weights.sum(), np.array(known.errors)[order]).tolist()
        return found

    def _server(self, name: str) -> _Server:
        known = self._servers.setdefault(name, _Server())
        self._servers.move_to_end(name)
        if len(self._servers) > MOST_SERVERS:
            self._servers.popitem(last=False)
        return known


def _line_key(work: NodeWork) -> tuple[str, str, int]:
    """Nodes of a class may differ in their amounts: one may sample only where it gets a latent."""
    return work.class_type, work.model, len(work.amounts)


def _bounded(off: float) -> float:
    """How far a node or a graph was off, as a logarithm, no further than one alone is believed."""
    return min(_MOST_OFF, max(-_MOST_OFF, off))


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


def _not_negative(gram: np.ndarray, right: np.ndarray) -> tuple[float, ...]:
    """argmin x' gram x / 2 - right' x with x >= 0, by trying all sets of entries that may be above zero: few are.

    Of the few sets, the first whose other entries would not pay is the one; no set passes where the matrix is nearly
    singular, and then the best one counts. Plain numbers: at four entries numpy is slower.
    """
    size, rows, wanted = len(right), gram.tolist(), right.tolist()
    best, best_value = (0.0,) * size, 0.0
    for count in range(size, 0, -1):
        for chosen in combinations(range(size), count):
            ridge = 1e-12 * sum(rows[i][i] for i in chosen)
            part = [[rows[i][j] + (ridge if i == j else 0.0) for j in chosen] + [wanted[i]] for i in chosen]
            found = _solved(part)
            if min(found) < 0.0:
                continue
            value = -0.5 * sum(wanted[i] * x for i, x in zip(chosen, found, strict=True))
            entries = [0.0] * size
            for i, x in zip(chosen, found, strict=True):
                entries[i] = x
            if value < best_value:
                best, best_value = tuple(entries), value
            if all(sum(map(mul, rows[i], entries)) >= wanted[i] for i in range(size) if i not in chosen):
                return tuple(entries)
    return best


def _solved(rows: list[list[float]]) -> list[float]:
    """The solution of a positive definite system, whose right side is the last column; below zero where it cannot be
    told. Changes the rows."""
    size = len(rows)
    for i in range(size):
        pivot = rows[i][i]
        if pivot <= 0.0:  # by rounding: the set is of no use
            return [-1.0] * size
        for below in rows[i + 1 :]:
            factor = below[i] / pivot
            for j in range(i + 1, size + 1):
                below[j] -= factor * rows[i][j]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (rows[i][size] - sum(rows[i][j] * found[j] for j in range(i + 1, size))) / rows[i][i]
    return found

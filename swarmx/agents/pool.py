"""The router's memory of the replicas of one model: arrays by replica, updated call by call."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from swarmx.agents.kept_view import Roster, fixed_row
from swarmx.agents.own_counts import OwnCounts
from swarmx.agents.pool_columns import FLOAT_ROW, FLOATS, INT_ROW, INTS, as_of, dispatched, tables
from swarmx.agents.prefix_index import PrefixIndex
from swarmx.core.fleet import PROFILE, FleetView, Floats, Ints
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call, Replica, ReplicaState

_IN_FLIGHT, _LAST_CHOSEN, _MAX_BATCH, _SLOT = (
    INT_ROW["in_flight"],
    INT_ROW["last_chosen"],
    INT_ROW["max_batch"],
    INT_ROW["slot"],
)
_REMAINING, _CONTEXT, _PREFILL = FLOAT_ROW["remaining_work"], FLOAT_ROW["context_tokens"], FLOAT_ROW["prefill_tokens"]
_VARIANCE, _KV_CAPACITY, _OTHERS = FLOAT_ROW["work_variance"], FLOAT_ROW["kv_capacity_tokens"], FLOAT_ROW["others"]
_READ_AT, _PREFILL_RATE, _MEASURED_AT = FLOAT_ROW["read_at_s"], FLOAT_ROW["prefill_rate"], FLOAT_ROW["measured_at_s"]
_USUAL = FLOAT_ROW["usual_others"]
_UNREAD, _SHARED, _WEIGHT = FLOAT_ROW["unread_tokens"], FLOAT_ROW["shared_tokens"], FLOAT_ROW["weight"]
_PROMPTS_BUSY, _SLOWDOWN = FLOAT_ROW["prefill_share"], FLOAT_ROW["slowdown"]
_TYPICAL_WEIGHT = 0.02
_USUAL_MEMORY_S = 20.0
_SLOWDOWN_WEIGHT = 0.05
_SLOWDOWN_MOST = 4.0  # of one call, either way


class Pool:
    """Replicas of one model. A replica keeps its column until it is gone; columns are compacted then.

    Where other routers send calls to the same replicas (`shared`), the engines' own counters tell of those calls: what
    an engine had beyond this router's calls of that time are calls like its own, and the longer ago that was, the
    less they are those of then and the more as many as there usually are.
    """

    def __init__(self, model: str, *, late_binding: bool = True, shared: bool = False, seed: int = 0) -> None:
        as_of(), dispatched()  # compiled here, and not in the first decision
        self.model = model
        self._late_binding = late_binding
        self._own: defaultdict[str, OwnCounts] | None = defaultdict(OwnCounts) if shared else None
        self._dice = np.full(int(shared), seed % 2**64, dtype=np.uint64)
        self._typical_work = self._typical_context = 0.0
        self._typical_weight = 1.0
        self.replicas: list[Replica] = []
        self.states: list[ReplicaState] = []
        self._fixed: list[bytes] = []  # what profiles tell, one object for all that are alike
        self._index: dict[str, int] = {}
        self._broken: set[str] = set()
        self._prefixes = PrefixIndex()
        self._slots = 0  # slots ever used at once
        self._free_slots: list[int] = []
        self._column_of: dict[int, int] = {}  # by slot
        self._ints: Ints = np.zeros((len(INTS), 8), dtype=np.int64)
        self._floats: Floats = np.zeros((len(FLOATS), 8))
        self._eligible: Ints = np.zeros(0, dtype=np.int64)
        self._place_of: dict[int, int] = {}  # among the eligible, by column
        self._roster: Roster | None = None
        self._roomy: Ints | None = None  # the eligible with room, until one fills up or is full no longer

    def __len__(self) -> int:
        return len(self.replicas)

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._index

    def set_state(self, replica: Replica, state: ReplicaState, now_s: float) -> None:
        """Add the replica, change its state, or forget it when it is gone."""
        column = self._index.get(replica.replica_id)
        if state == "gone":
            if column is not None:
                self._remove(column)
        elif column is None:
            self._add(replica, state, now_s)
        else:
            self.states[column] = state
            self._describe(column, replica)
        self._refresh()

    def set_broken(self, replica_id: str, broken: bool) -> None:
        """Open or close the circuit breaker of one replica."""
        (self._broken.add if broken else self._broken.discard)(replica_id)
        self._refresh()

    def set_signal(self, replica_id: str, running: int, waiting: int, kv_usage: float, measured_at_s: float) -> bool:
        """Keep the engine's own counters; an older report than the last one is ignored.

        Returns whether other routers have more or fewer calls there than was known.
        """
        column = self._index[replica_id]
        before_s = float(self._floats[_MEASURED_AT, column])
        if before_s >= measured_at_s:
            return False
        self._floats[FLOAT_ROW["running"], column] = running
        self._floats[FLOAT_ROW["waiting"], column] = waiting
        self._floats[FLOAT_ROW["kv_usage"], column] = kv_usage
        self._floats[_MEASURED_AT, column] = measured_at_s
        if self._own is None:
            return False
        own = self._own[replica_id].at(measured_at_s) if replica_id in self._own else 0
        others, known = max(0, running + waiting - own), self._floats[_OTHERS, column]
        self._floats[_OTHERS, column] = others
        heeded = 1.0 if math.isnan(before_s) else -math.expm1((before_s - measured_at_s) / _USUAL_MEMORY_S)
        self._floats[_USUAL, column] += heeded * (others - self._floats[_USUAL, column])
        if others != known:
            self._roomy = None
        return bool(others != known)

    def eligible(self, excluded: frozenset[str]) -> Ints:
        """Columns that may take a call; those in `excluded` only when nobody else is left."""
        if not excluded:
            return self._eligible
        tried = [self._index[replica_id] for replica_id in excluded if replica_id in self._index]
        rest = self._eligible[np.isin(self._eligible, tried, invert=True)]
        return rest if len(rest) else self._eligible

    def open(self, excluded: frozenset[str]) -> Ints:
        """Those of the eligible columns that may take a call now: with late binding, those with room in their batch."""
        if not self._late_binding:
            return self.eligible(excluded)
        if excluded:
            return self._with_room(self.eligible(excluded))
        if self._roomy is None:
            self._roomy = self._with_room(self._eligible)
        return self._roomy

    def view(self, columns: Ints, now_s: float, prefix: tuple[int, ...] = ()) -> FleetView:
        """The fleet as a policy sees it for a prompt: it cannot change the memory, nor is the view changed by it."""
        view = FleetView.over(*tables(len(columns)))
        as_of()(
            self._ints,
            self._floats,
            columns,
            now_s,
            self._dice,
            self._typical_work,
            self._typical_context,
            self._typical_weight,
            view.counts,
            view.numbers,
        )
        if prefix:
            view.cached_tokens[:] = self._prefixes.cached(prefix, self._slots)[self._ints[_SLOT].take(columns)]
        return view

    def home(self, session: str, columns: Ints) -> int | None:
        """Where among the columns, which rise, the replica is that served the session last."""
        slot = self._prefixes.home(session)
        if slot is None:
            return None
        column = self._column_of[slot]
        if columns is self._eligible:
            return self._place_of.get(column)
        found = int(columns.searchsorted(column))
        return found if found < len(columns) and columns[found] == column else None

    def dispatched(
        self,
        replica_id: str,
        call: Call,
        forecast: Forecast,
        decision: int,
        now_s: float,
        cached_tokens: float,
        weight: float = 1.0,
    ) -> None:
        """The call is on its way to the replica; what no cache holds of its prompt joins a backlog that drains at the
        prefill rate."""
        column = self._index[replica_id]
        shared = min(cached_tokens, float(call.prompt_tokens))
        if dispatched()(
            self._ints,
            self._floats,
            column,
            decision,
            now_s,
            call.prompt_tokens,
            shared,
            forecast.mean,
            forecast.variance,
            weight,
        ):
            self._roomy = None
        if self._own is not None:
            self._typical_weight += _TYPICAL_WEIGHT * (weight - self._typical_weight)
            heeded = _TYPICAL_WEIGHT if self._typical_work else 1.0
            self._typical_work += heeded * (forecast.mean - self._typical_work)
            self._typical_context += heeded * (call.prompt_tokens - self._typical_context)
            self._own[replica_id].changed(int(self._ints[_IN_FLIGHT, column]), now_s)
        if call.prefix or call.session:
            capacity = float(self._floats[_KV_CAPACITY, column])
            slot = int(self._ints[_SLOT, column])
            self._prefixes.dispatched(slot, call.prefix, call.session, capacity)

    def progressed(self, replica_id: str, work_change: float, context_change: float) -> None:
        """The expected rest of a call, and the context that it holds, have changed."""
        column = self._index.get(replica_id)
        if column is not None:
            self._floats[_REMAINING, column] = max(0.0, self._floats[_REMAINING, column] + work_change)
            self._floats[_CONTEXT, column] = max(0.0, self._floats[_CONTEXT, column] + context_change)

    def prompt_read(self, replica_id: str, tokens: float) -> None:
        """That many tokens of a prompt are read: its answer began, or ended."""
        column = self._index.get(replica_id)
        if column is not None:
            self._floats[_UNREAD, column] = max(0.0, self._floats[_UNREAD, column] - tokens)

    def ended(
        self,
        replica_id: str,
        work_left: float,
        variance: float,
        context: float,
        now_s: float,
        shared: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        """The call is no longer on the replica, whatever became of it."""
        column = self._index.get(replica_id)
        if column is None:
            return
        ints = self._ints[:, column]
        ints[_IN_FLIGHT] -= 1
        if self._own is not None:
            self._own[replica_id].changed(int(ints[_IN_FLIGHT]), now_s)
        if ints[_IN_FLIGHT] + self._floats[_OTHERS, column] == ints[_MAX_BATCH] - 1:
            self._roomy = None
        if ints[_IN_FLIGHT] == 0:  # an idle replica is idle exactly: no rounding error survives
            self._floats[[_REMAINING, _VARIANCE, _WEIGHT, _CONTEXT, _PREFILL, _UNREAD, _SHARED], column] = 0.0
        else:
            self._floats[_VARIANCE, column] = max(0.0, self._floats[_VARIANCE, column] - variance)
            self._floats[_WEIGHT, column] = max(0.0, self._floats[_WEIGHT, column] - weight)
            self._floats[_SHARED, column] = max(0.0, self._floats[_SHARED, column] - shared)
            self.progressed(replica_id, -work_left, -context)

    def took(self, replica_id: str, ratio: float) -> None:
        """A call took so many times what the profile of the replica says: a geometric mean of late, each bounded."""
        column = self._index.get(replica_id)
        if column is not None and math.isfinite(ratio) and ratio > 0.0:
            known = float(self._floats[_SLOWDOWN, column])
            bounded = min(_SLOWDOWN_MOST, max(1.0 / _SLOWDOWN_MOST, ratio))
            self._floats[_SLOWDOWN, column] = known * (bounded / known) ** _SLOWDOWN_WEIGHT

    def in_flight(self, replica_id: str) -> int:
        """How many of this router's calls are on the replica."""
        return int(self._ints[_IN_FLIGHT, self._index[replica_id]])

    @property
    def roster(self) -> Roster:
        """Who the columns are, until the fleet changes: another one tells of the fleet then."""
        if self._roster is None:
            self._roster = Roster([replica.replica_id for replica in self.replicas], self._fixed)
        return self._roster

    def _add(self, replica: Replica, state: ReplicaState, now_s: float) -> None:
        column = len(self.replicas)
        if column == self._ints.shape[1]:
            self._ints = np.concatenate([self._ints, np.zeros_like(self._ints)], axis=1)
            self._floats = np.concatenate([self._floats, np.zeros_like(self._floats)], axis=1)
        self.replicas.append(replica)
        self.states.append(state)
        self._fixed.append(b"")
        self._index[replica.replica_id] = column
        self._ints[:, column] = 0
        self._ints[_SLOT, column] = self._free_slots.pop() if self._free_slots else self._slots
        slot = int(self._ints[_SLOT, column])
        self._slots = max(self._slots, slot + 1)
        self._column_of[slot] = column
        self._floats[:, column] = 0.0
        for name in ("running", "waiting", "kv_usage", "measured_at_s"):
            self._floats[FLOAT_ROW[name], column] = math.nan
        self._floats[_SLOWDOWN, column] = 1.0
        self._floats[_READ_AT, column] = now_s
        self._describe(column, replica)

    def _describe(self, column: int, replica: Replica) -> None:
        """Keep what the replica is; what this router has on it stays."""
        profile = replica.profile
        self.replicas[column] = replica
        told = fixed_row(profile)
        self._fixed[column] = next((known for known in self._fixed if known == told), told)
        self._ints[_MAX_BATCH, column] = profile.max_batch
        for name in PROFILE:
            self._floats[FLOAT_ROW[name], column] = getattr(profile, name)
        self._floats[_PREFILL_RATE, column] = 1.0 / profile.prefill_token_s if profile.prefill_token_s > 0.0 else 0.0

    def _remove(self, column: int) -> None:
        self._broken.discard(self.replicas[column].replica_id)
        if self._own is not None:
            self._own.pop(self.replicas[column].replica_id, None)
        slot = int(self._ints[_SLOT, column])
        self._prefixes.forget(slot)
        self._free_slots.append(slot)
        del self.replicas[column], self.states[column], self._fixed[column]
        self._ints = np.delete(self._ints, column, axis=1)
        self._floats = np.delete(self._floats, column, axis=1)
        self._index = {replica.replica_id: c for c, replica in enumerate(self.replicas)}
        self._column_of = {slot: c for c, slot in enumerate(self._ints[_SLOT, : len(self.replicas)].tolist())}
        if self._ints.shape[1] == 0:
            self._ints, self._floats = np.zeros((len(INTS), 8), dtype=np.int64), np.zeros((len(FLOATS), 8))

    def _with_room(self, columns: Ints) -> Ints:
        counts = self._ints.take(columns, axis=1)
        there = counts[_IN_FLIGHT]
        if self._own is not None:
            there = there + self._floats[_OTHERS, columns]
        roomy: Ints = columns[there < counts[_MAX_BATCH]]
        return roomy

    def _refresh(self) -> None:
        assert self._ints.flags.c_contiguous  # compiled loops do not look
        assert self._floats.flags.c_contiguous
        self._roomy = self._roster = None
        self._eligible = np.array(
            [
                c
                for c, (replica, state) in enumerate(zip(self.replicas, self.states, strict=True))
                if state == "ready" and replica.replica_id not in self._broken
            ],
            dtype=np.int64,
        )
        self._place_of = {column: place for place, column in enumerate(self._eligible.tolist())}

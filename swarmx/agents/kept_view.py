"""The fleet view of a decision as the decision log keeps it: what candidates do not name, in few bytes, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from swarmx.core.engine import EngineProfile
from swarmx.core.fleet import COUNTS, MOVING, NAMED, NUMBERS, PROFILE, Choice, FleetView, Floats, Ints, Terms
from swarmx.core.nouns import Candidates, KeptView

FIXED = ("max_batch", *PROFILE)
FixedColumns = tuple[bytes, bytes]
"""`KeptView.fixed` and `KeptView.which`."""

_IN_FLIGHT, _LAST_CHOSEN = COUNTS.index("in_flight"), COUNTS.index("last_chosen")
_MOVING = slice(NUMBERS.index(MOVING[0]), NUMBERS.index(MOVING[-1]) + 1)
_COUNT = np.dtype("<u4")
_NUMBER = np.dtype("<f4")  # seven digits: costs that differ by less count as equal when it is read
_KEPT_ROWS = 32
_ALL = slice(None)


class Roster:
    """The replicas of a pool, by column, as long as none comes, goes or changes; `fixed` is the `fixed_row` of each."""

    def __init__(self, replica_ids: Sequence[str], fixed: Sequence[bytes]) -> None:
        self.replica_ids = tuple(replica_ids)
        self._fixed = tuple(fixed)
        self._named: tuple[Ints, tuple[tuple[str, ...], FixedColumns]] | None = None  # of the columns that came last

    def candidates(self, columns: Ints, view: FleetView, choice: Choice, second: int | None) -> Candidates:
        """What of the view is worth keeping in the decision log: the chosen one, the second and the cheapest others."""
        kept = _kept(view.in_flight if choice.cost_s is None else choice.cost_s, choice.index, second)
        replica_ids, fixed = self._names(columns, kept)
        work, context, signal_age_s = view.numbers[: len(NAMED), kept].tolist()
        cost_s, terms_s = _costs(choice, kept)
        return Candidates(
            total=len(columns),
            replica_ids=replica_ids,
            in_flight=tuple(view.counts[_IN_FLIGHT, kept].tolist()),
            remaining_work=tuple(work),
            context_tokens=tuple(context),
            signal_age_s=_finite(signal_age_s),
            cost_s=cost_s,
            terms_s=terms_s,
            view=keep(view, kept, fixed),
        )

    def _names(self, columns: Ints, kept: Ints | slice) -> tuple[tuple[str, ...], FixedColumns]:
        """Of the replicas that are kept, their names and what their profiles tell."""
        if self._named is not None and self._named[0] is columns and kept is _ALL:
            return self._named[1]
        rows = columns[kept].tolist()
        named = tuple([self.replica_ids[c] for c in rows]), fixed_columns([self._fixed[c] for c in rows])
        self._named = (columns, named) if kept is _ALL else None
        return named


def fixed_row(profile: EngineProfile) -> bytes:
    """The columns of a replica that its profile tells, [FIXED]."""
    return np.array([getattr(profile, name) for name in FIXED], dtype=_NUMBER).tobytes()


def fixed_columns(rows: Sequence[bytes]) -> FixedColumns:
    """What the profiles tell of replicas, by the `fixed_row` of each, of which many share one."""
    number = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    return b"".join(number), bytes([number[row] for row in rows])


def keep(view: FleetView, rows: Ints | slice, fixed: FixedColumns) -> KeptView:
    """These rows of the view; `fixed` is what their profiles tell."""
    return KeptView(
        chosen=view.counts[_LAST_CHOSEN, rows].astype(_COUNT).tobytes(),
        moving=view.numbers[_MOVING, rows].astype(_NUMBER).tobytes(),
        fixed=fixed[0],
        which=fixed[1],
    )


def view_of(seen: Candidates) -> FleetView | None:
    """The view of a decision's candidates again; None where its columns were not kept, or are of another version."""
    kept, rows = seen.view, len(seen.replica_ids)
    if (
        kept is None
        or len(kept.moving) != 4 * len(MOVING) * rows
        or not rows == len(kept.which) == len(kept.chosen) / 4
    ):
        return None
    if len(kept.fixed) != 4 * len(FIXED) * len(set(kept.which)):
        return None
    moving = np.frombuffer(kept.moving, dtype=_NUMBER).reshape(len(MOVING), rows).astype(np.float64)
    kinds = np.frombuffer(kept.fixed, dtype=_NUMBER).reshape(-1, len(FIXED)).astype(np.float64)
    fixed = kinds[np.frombuffer(kept.which, dtype=np.uint8)].T
    columns: dict[str, Floats] = dict(zip(MOVING + FIXED, (*moving, *fixed), strict=True))
    max_batch = columns.pop("max_batch")
    return FleetView(
        in_flight=np.array(seen.in_flight, dtype=np.int64),
        last_chosen=np.frombuffer(kept.chosen, dtype=_COUNT).astype(np.int64),
        max_batch=max_batch.astype(np.int64),
        remaining_work=np.array(seen.remaining_work),
        context_tokens=np.array(seen.context_tokens),
        signal_age_s=np.array([np.nan if age_s is None else age_s for age_s in seen.signal_age_s]),
        **columns,
    )


def _kept(order: Floats | Ints, chosen: int, second: int | None) -> Ints | slice:
    """Positions of the `_KEPT_ROWS` smallest of `order`, two of which have to be there; all, if there are so few."""
    if len(order) <= _KEPT_ROWS:
        return _ALL
    smallest: list[int] = np.argpartition(order, _KEPT_ROWS - 1)[:_KEPT_ROWS].tolist()
    wanted = dict.fromkeys([chosen, *smallest] if second is None else [chosen, second, *smallest])
    return np.array(list(wanted)[:_KEPT_ROWS], dtype=np.int64)


def _costs(
    choice: Choice, kept: Ints | slice
) -> tuple[tuple[float | None, ...] | None, dict[str, tuple[float | None, ...]]]:
    """The cost of each replica that is kept, and what it is made of."""
    if choice.cost_s is None:
        return None, {name: _finite(values[kept].tolist()) for name, values in choice.terms_s.items()}
    terms_s = choice.terms_s
    whole = terms_s.table if isinstance(terms_s, Terms) else np.array([choice.cost_s, *terms_s.values()])
    cost_s, *terms = map(_finite, whole[:, kept].tolist())
    return cost_s, dict(zip(terms_s, terms, strict=True))


def _finite(numbers: list[float]) -> tuple[float | None, ...]:
    """A journal holds JSON, which has no NaN and no infinity."""
    if math.isfinite(sum(numbers)):
        return tuple(numbers)
    return tuple([number if math.isfinite(number) else None for number in numbers])

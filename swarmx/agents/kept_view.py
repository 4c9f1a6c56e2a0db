"""The fleet view of a decision as the decision log keeps it: what candidates do not name, in few bytes, and back."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from swarmx.core.engine import EngineProfile
from swarmx.core.fleet import FleetView, Floats, Ints
from swarmx.core.nouns import Candidates, KeptView

# The rest is last_chosen, and what candidates name: in_flight, remaining_work, context_tokens, signal_age_s.
MOVING = (
    "work_variance",
    "weight",
    "prefill_tokens",
    "unread_tokens",
    "shared_tokens",
    "cached_tokens",
    "prefill_share",
    "slowdown",
    "running",
    "waiting",
    "kv_usage",
)
PROFILE = (
    "kv_capacity_tokens",
    "max_step_tokens",
    "cost_weight",
    "call_base_s",
    "step_base_s",
    "decode_seq_s",
    "decode_ctx_token_s",
    "prefill_token_s",
    "prefill_ctx_token_s",
)
"""The columns of a view that are numbers of a replica's profile, but for its whole ones."""

FIXED = ("max_batch", *PROFILE)
FixedColumns = tuple[bytes, bytes]
"""`KeptView.fixed` and `KeptView.which`."""

_moving_of = operator.attrgetter(*MOVING)
_COUNT = np.dtype("<u4")
_NUMBER = np.dtype("<f4")  # seven digits: costs that differ by less count as equal when it is read


def fixed_row(profile: EngineProfile) -> bytes:
    """The columns of a replica that its profile tells, [FIXED]."""
    return np.array([getattr(profile, name) for name in FIXED], dtype=_NUMBER).tobytes()


def fixed_columns(rows: Sequence[bytes]) -> FixedColumns:
    """What the profiles tell of replicas, by the `fixed_row` of each, of which many share one."""
    number = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    return b"".join(number), bytes([number[row] for row in rows])


def keep(view: FleetView, rows: Ints | slice, fixed: FixedColumns) -> KeptView:
    """These rows of the view; `fixed` is what their profiles tell."""
    moving: list[Floats] = [column[rows] for column in _moving_of(view)]
    return KeptView(
        chosen=view.last_chosen[rows].astype(_COUNT).tobytes(),
        moving=np.concatenate(moving, dtype=_NUMBER, casting="same_kind").tobytes(),
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

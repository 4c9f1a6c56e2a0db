"""What another policy would have done with a call, told from the record of the decision alone."""

from __future__ import annotations

import msgspec
import numpy as np

from swarmx.agents.choice import is_sound
from swarmx.agents.kept_view import view_of
from swarmx.agents.objective import parameters_in
from swarmx.agents.policies import make_policy
from swarmx.core.fleet import CallView, FleetView, WorkflowView
from swarmx.core.nouns import Decision

_SEED = 0


class Instead(msgspec.Struct, frozen=True, kw_only=True):
    """The other policy's choice; `cost_s` by candidate of the decision, None where it told or saw none.

    With `hold`, the call would have waited for the replica. Without a replica, `notes` say why there is none.
    """

    policy: str
    parameters: dict[str, float]
    replica_id: str | None
    hold: bool
    cost_s: tuple[float | None, ...] | None
    notes: list[str]


def instead(decision: Decision, policy: str) -> Instead:
    """Ask the policy, with its default parameters, about what the decision saw; the policy in force with its own.

    Raises ConfigError for a policy that does not exist.
    """
    asked = make_policy(policy, decision.parameters if policy == decision.policy else None)
    parameters, same = parameters_in(asked), policy == decision.policy
    view, seen = view_of(decision.candidates), decision.candidates
    notes: list[str] = []

    def nothing(why: str) -> Instead:
        return Instead(
            policy=policy, parameters=parameters, replica_id=None, hold=False, cost_s=None, notes=[*notes, why]
        )

    if view is None or decision.workflow is None:
        return nothing("This decision was stored without all that a policy looks at, by another version of SwarmX.")
    rows, full = np.arange(len(view)), view.room == 0
    sent_to = seen.replica_ids.index(decision.replica_id) if decision.replica_id in seen.replica_ids else None
    bound_late = sent_to is None or not full[sent_to]  # then the router sends nothing to a full one
    if seen.total > len(view):
        notes.append(
            f"Of {seen.total} candidates {len(view)} were kept, the best by {decision.policy}; it saw no others."
        )
    if not asked.waits and not same and bound_late and full.any() and not full.all():
        rows = (~full).nonzero()[0]  # what the router shows a policy that lets no call wait
        notes.append(f"{policy} holds no call back: it was shown the {len(rows)} candidates with room.")
    elif asked.waits and not same and not full.any():  # there were none, or the policy in force was not shown them
        notes.append(f"No candidate without room was kept, so {policy} could not hold the call for one.")
    shown, rng = _rows(view, rows), np.random.default_rng(_SEED)
    try:
        choice = asked.choose(_call(decision, rows), shown, rng)
        sound = is_sound(choice, len(shown))
    except Exception:  # noqa: BLE001  # as in the router: a policy is a plug-in
        sound = False
    if not sound:
        return nothing(f"{policy} failed on it; the router would have overruled it.")
    if rng.bit_generator.state != np.random.default_rng(_SEED).bit_generator.state:
        notes.append(f"{policy} drew at random, here from a fixed seed: another draw may end elsewhere.")
    cost_s: list[float | None] = [None] * len(view)
    if choice.cost_s is not None:
        for row, cost in zip(rows.tolist(), choice.cost_s.tolist(), strict=True):
            cost_s[row] = cost if np.isfinite(cost) else None
    return Instead(
        policy=policy,
        parameters=parameters,
        replica_id=seen.replica_ids[int(rows[choice.index])],
        hold=asked.waits and bound_late and (choice.hold or bool(shown.room[choice.index] == 0)),
        cost_s=None if choice.cost_s is None else tuple(cost_s),
        notes=notes,
    )


def explain_instead(decision: Decision, other: Instead) -> list[str]:
    """Sentences that set the two side by side."""
    if other.replica_id is None:
        return list(other.notes)
    here, there = decision.replica_id, other.replica_id
    if other.hold:
        first = f"{other.policy} would have let the call wait for {there}."
    elif here == there:
        first = f"{other.policy} would have sent it to {there} as well."
    else:
        first = f"{other.policy} would have sent it to {there} instead of {here}."
    lines = [first]
    if other.cost_s is not None:
        ids = decision.candidates.replica_ids
        costs = [(name, other.cost_s[ids.index(name)]) for name in dict.fromkeys((there, here))]
        told = ", ".join(f"{cost:.3g} for {name}" for name, cost in costs if cost is not None)
        if told:
            lines.append(f"By its own measure: {told}.")
    return [*lines, *other.notes]


def _call(decision: Decision, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> CallView:
    kept = decision.workflow
    assert kept is not None
    ids = [decision.candidates.replica_ids[row] for row in rows]
    return CallView(
        call=decision.call,
        forecast=decision.forecast,
        workflow=WorkflowView(
            kind=decision.call.workflow_kind,
            past_s=np.zeros(0),
            **{f: getattr(kept, f) for f in kept.__struct_fields__},
        ),
        now_s=decision.at_s,
        waited_s=decision.waited_s,
        ahead=decision.ahead,
        home=ids.index(decision.home) if decision.home in ids else None,
    )


def _rows(view: FleetView, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> FleetView:
    return FleetView.over(view.counts[:, rows], view.numbers[:, rows])

"""What is tuned, of every policy alike: a small table of settings, searched one dimension after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from eval.sim.settings import PathName
from swarmx.agents.policies import parameters_of
from swarmx.core.engine_order import OrderName

Change = Mapping[str, float | PathName | OrderName]
Dimension = Sequence[Change]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Of a policy: its parameters, whether calls wait in the router, what it hears of the rest of a workflow, and the
    order of the engines."""

    parameters: dict[str, float] = {}
    late_binding: bool = True
    path: PathName = "none"
    order: OrderName = "arrival"


def each(name: str, *values: float | PathName | OrderName) -> Dimension:
    """The dimension of one parameter."""
    return [{name: value} for value in values]


LATE = each("late_binding", 1.0, 0.0)
IN_ENGINE = each("order", "arrival", "priority")
"""Whether engines look at the priorities that a policy gives."""

GRIDS: Mapping[str, Sequence[Dimension]] = {
    "weighted_least_outstanding": [each("batch", 8, 16, 64)],
    "speed_edf": [each("batch", 8, 16, 64), each("prompt_per_output", 1, 4), each("context_tokens", 2000, 4000)],
    "session_affinity": [each("slack", 1, 4, 8, 1e9)],
    "sglang_cache_aware": [
        each("cache_threshold", 0.3, 0.5),
        each("balance_abs_threshold", 2, 8, 16, 32, 64),
        each("balance_rel_threshold", 1.1, 1.5),
    ],
    "dynamo_kv": [each("prefill_load_scale", 0.5, 1, 2), each("decode_active_request_weight", 0, 8, 32)],
    "llmd_sticky": [each("max_ttft_penalty_s", 1, 3, 8, 18), each("call_tokens", 0, 500, 2000)],
    "llmd_load": [
        [
            {"prefix_weight": prefix, "queue_weight": queue, "kv_weight": kv}
            for prefix, queue, kv in ((3.0, 2.0, 2.0), (1.0, 1.0, 1.0), (1.0, 2.0, 2.0))
        ]
    ],
    "llmd_predicted": [each("e2e", 0, 1), each("mean", 0, 1)],
    "aibrix_prefix": [each("imbalance_count", 2, 4, 8, 16)],
    "preble": [each("rebalance", 1.2, 1.5, 3), each("exploit_threshold", 0.3, 0.5, 0.8)],
    "murakkab_mean": [each("share", 0, 1)],
    "autellix_plas": [IN_ENGINE, each("short_tokens", 1024, 2048, 8192), each("wait_for_home", 0, 1)],
    "gittins": [IN_ENGINE],
    "thunderagent": [IN_ENGINE, each("pause", 0.8, 0.95), each("hysteresis", 0.05, 0.2)],
    "swarmx_paper": [each("share", 0, 1)],
    "swarmx_paper_repo": [each("share", 0, 1), each("fine", 0, 1)],
    "marginal": [
        each("tail", 0, 1, 2),
        each("relative", 0.5, 1),
        each("externality", 0.5, 1, 2),
        IN_ENGINE,
    ],
}
"""By policy; a search begins at the published defaults. Policies that are not here have no parameters that matter."""


def dimensions(policy: str) -> list[Dimension]:
    """All that is searched for a policy; whether calls wait in the router comes first, for every one."""
    return [LATE, *GRIDS.get(policy, ())]


def candidates(policy: str) -> int:
    """Simulations that a search takes, for one workload: the first settings, and each other value of a dimension."""
    return 1 + sum(len(dimension) - 1 for dimension in dimensions(policy))


def defaults(policy: str) -> Settings:
    """Where a search begins: every parameter as the policy has it."""
    return Settings(parameters=dict(sorted(parameters_of(policy).items())))


def changed(settings: Settings, change: Change) -> Settings:
    """The settings with another value of a dimension."""
    parameters, others = dict(settings.parameters), dict[str, object]()
    for name, value in change.items():
        if isinstance(value, str):
            others[name] = value
        elif name == "late_binding":
            others[name] = bool(value)
        else:
            parameters[name] = float(value)
    return msgspec.structs.replace(settings, parameters=dict(sorted(parameters.items())), **others)

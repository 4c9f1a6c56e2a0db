"""How a router is set up."""

from __future__ import annotations

import msgspec

from swarmx.agents.policies import DEFAULT_POLICY


class TenantSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant is owed, and what it may take.

    Where calls of several tenants wait, each gets service in proportion to its `weight`. `tokens_per_minute` bounds
    its prompt and output tokens, None for no bound. Its calls have `priority` at most.
    """

    weight: float = 1.0
    tokens_per_minute: float | None = None
    priority: int = 0


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How patient a router is. Times in seconds.

    With `late_binding`, a call waits in the router until a replica runs fewer calls than its largest batch; without,
    it goes to one at once and may wait there. `queue_timeout_s` is for calls that have no replica to wait for.
    `first_token_timeout_s` is for streamed calls; `call_timeout_s` for the whole of others, and for the rest of a
    stream from its first token on. `demand_every_s` is the time between two reports of demand, 0 for none. Calls for
    `models` wait for a replica even before the first one of that model is known.

    Of the calls that wait, the first `hold_depth` are asked about whenever something changes, and none is held back
    for a busy replica for longer than `hold_limit_s`. Workflows of a kind in `targets` should end within so many
    seconds. With `shared` replicas, other routers send them calls, too. With `log_decisions` off, no decision is told
    to the log: only simulations do without. What a decision leaves to be done, its record, its timers and the books, is
    done with the next message, at most `put_off_s` after it: 0 for at once.

    Tenants that `tenants` does not name have the defaults of `TenantSettings`. Service is counted in uncached prompt
    tokens and output tokens with these weights. A call that waits counts as one priority higher for each
    `priority_age_s`. When `max_waiting` calls of a model wait, further ones are refused, or take the places of tenants
    that have more than their share of them.
    """

    policy: str = DEFAULT_POLICY
    parameters: dict[str, float] = {}
    seed: int = 0
    max_attempts: int = 3
    queue_timeout_s: float = 30.0
    first_token_timeout_s: float = 120.0
    call_timeout_s: float = 1200.0
    breaker_failures: int = 3
    breaker_open_s: float = 10.0
    demand_every_s: float = 2.0
    models: list[str] = []
    late_binding: bool = True
    hold_depth: int = 8
    hold_limit_s: float = 60.0
    targets: dict[str, float] = {}
    shared: bool = False
    log_decisions: bool = True
    put_off_s: float = 0.0
    tenants: dict[str, TenantSettings] = {}
    prompt_token_weight: float = 1.0
    output_token_weight: float = 2.0
    priority_age_s: float = 30.0
    max_waiting: int = 10_000

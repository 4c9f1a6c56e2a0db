"""A decision in plain words, from the record alone."""

from __future__ import annotations

from swarmx.core.forecast import Forecast, Unit
from swarmx.core.nouns import Decision

_WORTH_TELLING_S = 0.01
_UNITS: dict[Unit, str] = {"tokens": "output tokens", "work": "megapixel-steps", "s": "seconds", "calls": "calls"}


def explain(decision: Decision) -> list[str]:
    """Sentences that say where the call went, what spoke for it, and what came second."""
    call, seen, forecast = decision.call, decision.candidates, decision.forecast
    chosen = seen.replica_ids.index(decision.replica_id)
    by = f"{forecast.source} {forecast.version}".rstrip()
    low, high, tail = (_amount(forecast, level) for level in (0.5, 0.9, 0.99))
    prompt = "" if call.kind == "tool" else f"; the prompt has about {call.prompt_tokens} tokens"
    lines = [
        f"Attempt {decision.attempt} of {call.call_id} ({call.role} on {call.model}) went to {decision.replica_id} "
        f"by {decision.policy}, one of {seen.total} ready replicas.",
        f"Forecast ({by}): {low} {_UNITS[forecast.unit]} at the median, {high} at P90, {tail} at P99{prompt}.",
    ]
    if seen.cost_s is None:
        lines.append(
            f"{decision.policy} does not estimate times; {decision.replica_id} had {seen.in_flight[chosen]} calls in "
            f"flight, the others {_span([n for i, n in enumerate(seen.in_flight) if i != chosen])}."
        )
    else:
        terms = ", ".join(f"{name.removesuffix('_s')} {_time(values[chosen])}" for name, values in seen.terms_s.items())
        lines.append(f"Expected there: {_time(seen.cost_s[chosen])} ({terms}), with {seen.in_flight[chosen]} ahead.")
        if decision.runner_up is not None:
            second = seen.replica_ids.index(decision.runner_up)
            lines.append(
                f"Runner-up: {decision.runner_up} at {_time(seen.cost_s[second])}, {seen.in_flight[second]} ahead."
            )
    age_s = seen.signal_age_s[chosen]
    lines.append(
        "The replica had not reported its own counters yet."
        if age_s is None
        else f"The replica's own counters were {age_s:.1f} s old; the router's count of its calls is exact."
    )
    if decision.waited_s >= _WORTH_TELLING_S:
        lines.append(f"It had waited {_time(decision.waited_s)} in the router, at priority {call.priority}.")
    if decision.note:
        lines.append(f"Note: {decision.note}.")
    return lines


def _amount(forecast: Forecast, level: float) -> str:
    value = forecast.quantile(level)
    return f"{value:.3g}" if forecast.unit == "s" else f"{value:.0f}"


def _time(seconds: float | None) -> str:
    return "no finite time" if seconds is None else f"{seconds:.3g} s"


def _span(values: list[int]) -> str:
    if not values:
        return "do not exist"
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"

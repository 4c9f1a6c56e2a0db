"""A replica as a serial queue: when it has done what it holds, as a distribution, and how long a call then takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swarmx.core.fleet import CallView, FleetView, Floats

_MOST_CV = 2.0  # a sketch that spreads more than this is cut back: the approximation below holds up to here


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialView:
    """Each array has shape [replicas].

    `queue_s` is the mean time until the replica has done all it holds, `queue_sd_s` its standard deviation. A call of
    w units of work then takes `fixed_s + w * per_work_s`.
    """

    queue_s: Floats
    queue_sd_s: Floats
    fixed_s: Floats
    per_work_s: Floats


def serial_view(call: CallView, fleet: FleetView, share: float) -> SerialView:
    """Every replica as one queue that does its work one after the other.

    A unit of work takes the step time of the batch that the call would join; a unit of queued work takes that divided
    by (calls in flight)^`share`: with 0 calls run one by one, with 1 the batch shares each step.
    """
    prompt = call.call.prompt_tokens
    batch = np.minimum(fleet.in_flight + 1, fleet.max_batch)
    step_s = (
        fleet.step_base_s
        + fleet.decode_seq_s * batch
        + fleet.decode_ctx_token_s * (fleet.context_tokens + prompt + call.forecast.mean / 2.0)
    )
    together = np.clip(fleet.in_flight, 1, fleet.max_batch) ** share
    not_begun = np.maximum(0, fleet.in_flight - fleet.max_batch)
    queued_step_s = step_s / together
    return SerialView(
        queue_s=fleet.remaining_work * queued_step_s
        + fleet.prefill_tokens * fleet.prefill_token_s
        + not_begun * fleet.call_base_s / together,
        queue_sd_s=np.sqrt(fleet.work_variance) * queued_step_s,
        fixed_s=fleet.call_base_s
        + fleet.prefill_token_s * prompt
        + fleet.prefill_ctx_token_s * (prompt * prompt / 2.0),
        per_work_s=step_s,
    )


def gamma_quantiles(mean: Floats, sd: Floats, normal: Floats) -> Floats:
    """Quantiles of gamma distributions of this mean and deviation at standard normal scores (Wilson & Hilferty 1931).

    `mean` and `sd` have shape [replicas]; `normal` and the result have one that broadcasts with it.
    """
    third = np.minimum(sd, _MOST_CV * mean) / (3.0 * np.maximum(mean, 1e-12))
    root: Floats = third * normal
    root += 1.0 - third * third
    np.maximum(root, 0.0, out=root)
    cube: Floats = root * root
    cube *= root
    cube *= mean
    return cube


def gamma_scores(mean: Floats, sd: Floats, value: Floats) -> Floats:
    """The standard normal scores of values above zero in such distributions: the inverse of `gamma_quantiles`."""
    third = np.maximum(np.minimum(sd, _MOST_CV * mean) / (3.0 * np.maximum(mean, 1e-12)), 1e-6)
    scores: Floats = (np.cbrt(value / np.maximum(mean, 1e-12)) - 1.0 + third * third) / third
    return scores

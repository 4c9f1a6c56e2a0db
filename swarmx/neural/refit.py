"""Fits the output layer of a head again, in numpy: what a few hundred new outcomes can teach without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from swarmx.core.errors import PredictorError
from swarmx.neural.head import Floats, Head
from swarmx.neural.losses import pinball
from swarmx.neural.net import QuantileNet
from swarmx.neural.table import Table

_LEAST_TRAIN, _LEAST_VALIDATION = 32, 8
_BETAS = 0.9, 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitSettings:
    """`steps` of Adam on all rows at once. The weights are held to where they were (ridge), the less the more rows
    there are: by `hold` over their effective number. The best by the validation rows, looked at every `look` steps, is
    kept; `patience` looks without gain end it.
    """

    steps: int = 400
    learning_rate: float = 0.02
    hold: float = 6.0
    look: int = 10
    patience: int = 6


def refit(head: Head, table: Table, settings: RefitSettings | None = None) -> Head:
    """The head with output weights that fit the train rows better by weighted pinball loss of the logarithm.

    What the hidden layer has learnt before stays, so that little data is enough; conformal shifts stay as they are
    and are reckoned with. The same data gives the same weights. A censored row that is above a quantile pulls, one
    below does not. Returns the head unchanged when nothing better was found. Raises PredictorError when there are
    fewer than 32 rows to train and 8 to validate on.
    """
    settings = settings or RefitSettings()
    train, validation = table.part("train"), table.part("validation")
    if len(train) < _LEAST_TRAIN or len(validation) < _LEAST_VALIDATION:
        raise PredictorError(
            f"the head {head.spec.name} needs at least {_LEAST_TRAIN} rows to train again and {_LEAST_VALIDATION} to "
            f"validate on, got {len(train)} and {len(validation)}; wait for more calls to finish."
        )
    x = head.standardised(train.features)
    inner = [np.maximum(x @ net.hidden + net.hidden_bias, 0.0) for net in head.nets]  # [rows, hidden] each
    log_y = np.log(train.target + head.spec.softening)
    weight = train.weight / train.weight.sum()
    hold = settings.hold * float(weight @ weight)  # one over the effective number of rows (Kish)
    tau = np.asarray(head.spec.levels)
    old = [_parts(net) for net in head.nets]
    new = [tuple(part.copy() for part in parts) for parts in old]
    moments = [[(np.zeros_like(part), np.zeros_like(part)) for part in parts] for parts in old]
    best, best_loss, stale = head, weighted_loss(head, validation), 0
    apart = log_y[:, None] - train.anchor[:, None] - _shifts(head, train)
    for step in range(1, settings.steps + 1):
        z = [inner[i] @ out + x @ skip + bias for i, (out, skip, bias) in enumerate(new)]
        q = sum(_quantiles(one, net.middle) for one, net in zip(z, head.nets, strict=True)) / len(head.nets)
        error = apart - q
        pull = np.where(error > 0.0, -tau, np.where(train.censored[:, None], 0.0, 1.0 - tau))
        slope = pull * (weight[:, None] / len(tau) / len(head.nets))
        for i, net in enumerate(head.nets):
            gz = _through_steps(z[i], net.middle, slope)
            gradients = (inner[i].T @ gz, x.T @ gz, gz.sum(axis=0))
            for j, gradient in enumerate(gradients):
                pulled = gradient + hold * (new[i][j] - old[i][j])
                _adam(new[i][j], moments[i][j], pulled, step, settings.learning_rate)
        if step % settings.look == 0:
            candidate = _with(head, new)
            loss = weighted_loss(candidate, validation)
            stale = 0 if loss < best_loss - 1e-6 else stale + 1
            if stale == 0:
                best, best_loss = candidate, loss
            elif stale >= settings.patience:
                break
    return best


def weighted_loss(head: Head, table: Table) -> float:
    """Mean pinball loss of the logarithm over all levels, uncensored rows by their weight: a relative error."""
    rows = table.where(~table.censored)
    if len(rows) == 0:
        return float("inf")
    q = head.log_quantiles(rows.features, rows.anchor, list(rows.group))
    loss = pinball(np.log(rows.target + head.spec.softening), q, head.spec.levels).mean(axis=1)
    return float(loss @ rows.weight / rows.weight.sum())


def _parts(net: QuantileNet) -> tuple[Floats, Floats, Floats]:
    return net.out.astype(np.float64), net.skip.astype(np.float64), net.out_bias.astype(np.float64)


def _with(head: Head, parts: list[tuple[Floats, ...]]) -> Head:
    nets = []
    for net, new in zip(head.nets, parts, strict=True):
        out, skip, out_bias = (part.astype(np.float32) for part in new)
        nets.append(replace(net, out=out, skip=skip, out_bias=out_bias))
    return replace(head, nets=tuple(nets), version="")


def _shifts(head: Head, table: Table) -> Floats:
    """What calibration adds to each row, [rows, K], or zero."""
    if not head.shifts:
        return np.zeros((1, len(head.spec.levels)))
    return np.stack([head.shifts.get(group, head.shifts[""]) for group in table.group.tolist()]).astype(np.float64)


def _quantiles(z: Floats, middle: int) -> Floats:
    """[rows, K] as `QuantileNet` makes them of z."""
    steps = (z + np.sqrt(z * z + 4.0)) / 2.0
    q: Floats = np.empty_like(z)
    q[:, middle] = z[:, middle]
    q[:, middle + 1 :] = z[:, middle, None] + np.cumsum(steps[:, middle + 1 :], axis=1)
    q[:, :middle] = z[:, middle, None] - np.cumsum(steps[:, :middle][:, ::-1], axis=1)[:, ::-1]
    return q


def _through_steps(z: Floats, middle: int, slope: Floats) -> Floats:
    """The gradient by z [rows, K] from that by the quantiles [rows, K]."""
    root = np.sqrt(z * z + 4.0)
    steepness = (z + root) / (2.0 * root)
    above = np.cumsum(slope[:, :middle:-1], axis=1)[:, ::-1]  # each step moves all quantiles further out
    below = np.cumsum(slope[:, :middle], axis=1)
    gz: Floats = np.empty_like(slope)
    gz[:, middle] = slope.sum(axis=1)
    gz[:, middle + 1 :] = above * steepness[:, middle + 1 :]
    gz[:, :middle] = -below * steepness[:, :middle]
    return gz


def _adam(part: Floats, moments: tuple[Floats, Floats], gradient: Floats, step: int, rate: float) -> None:
    """One step, in place (Kingma and Ba, ICLR 2015)."""
    first, second = moments
    first *= _BETAS[0]
    first += (1.0 - _BETAS[0]) * gradient
    second *= _BETAS[1]
    second += (1.0 - _BETAS[1]) * gradient * gradient
    scale = np.sqrt(second / (1.0 - _BETAS[1] ** step)) + 1e-8
    part -= rate * (first / (1.0 - _BETAS[0] ** step)) / scale

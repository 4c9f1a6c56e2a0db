"""A small quantile network in numpy: what inference needs of what torch has trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantileNet:
    """One hidden layer with a linear path around it, and K outputs that cannot cross.

        z = relu(x @ hidden + hidden_bias) @ out + x @ skip + out_bias                                   [batch, K]
        q[middle] = z[middle];  q[k] = q[k - 1] + p(z[k]) above it;  q[k] = q[k + 1] - p(z[k]) below it

    with p(z) = (z + sqrt(z² + 4)) / 2, "squareplus" (Barron, arXiv 2112.11687): positive like softplus, and a tenth of
    its price. Shapes: hidden [features, hidden], out [hidden, K], skip [features, K].
    """

    hidden: Floats32
    hidden_bias: Floats32
    out: Floats32
    skip: Floats32
    out_bias: Floats32
    middle: int
    first: Floats32 = field(init=False, repr=False)  # [features, hidden + K], both affine maps of x in one
    first_bias: Floats32 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", np.concatenate([self.hidden, self.skip], axis=1))
        object.__setattr__(self, "first_bias", np.concatenate([self.hidden_bias, self.out_bias]))

    def __call__(self, x: Floats32) -> Floats32:
        """Quantiles [batch, K] of standardised features [batch, features], or [K] of one row; they rise along K."""
        both = x @ self.first
        both += self.first_bias
        split = self.hidden.shape[1]
        return self.finish(both[..., :split], both[..., split:])

    def finish(self, inner: Floats32, direct: Floats32) -> Floats32:
        """The rest, from both affine maps of x: before the relu [batch, hidden], and around it [batch, K]."""
        z = np.maximum(inner, 0.0) @ self.out
        z += direct
        steps: Floats32 = z * z
        steps += np.float32(4.0)
        np.sqrt(steps, out=steps)
        steps += z
        q = steps @ _outwards(z.shape[-1], self.middle)
        q += z[..., self.middle, None]
        return q


@cache
def _outwards(k: int, middle: int) -> Floats32:
    """[K, K]: halves of the steps, summed from the middle outwards; a product with it is one call instead of 2 K."""
    sums = np.zeros((k, k), dtype=np.float32)
    for j in range(k):
        sums[middle + 1 : j + 1, j] = 0.5
        sums[j:middle, j] = -0.5
    return sums

"""Several heads over the same features, asked in one go: small matrices cost by the call, not by the number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swarmx.neural.head import Floats, Head
from swarmx.neural.net import Floats32


class FusedHeads:
    """The same numbers as each head's own `log_quantiles`, up to rounding. The heads read the same features in order.

    Networks that a head does not have, and hidden units that a network does not have, are zeros.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        nets, width = max(len(head.nets) for head in heads), max(net.hidden.shape[1] for h in heads for net in h.nets)
        features, k = heads[0].nets[0].skip.shape
        shape = (len(heads), nets)
        self._middle = heads[0].nets[0].middle
        self._mean = np.stack([head.mean for head in heads])[:, None]
        self._scale = np.stack([head.scale for head in heads])[:, None]
        self._limit = np.array([head.limit for head in heads], dtype=np.float32)[:, None, None]
        self._hidden = np.zeros((*shape, features, width), dtype=np.float32)
        self._hidden_bias = np.zeros((*shape, 1, width), dtype=np.float32)
        self._out = np.zeros((*shape, width, k), dtype=np.float32)
        self._skip = np.zeros((*shape, features, k), dtype=np.float32)
        self._out_bias = np.zeros((*shape, 1, k), dtype=np.float32)
        self._weight = np.zeros((*shape, 1, 1), dtype=np.float32)
        self._shifts = [head.shifts for head in heads]
        for i, head in enumerate(heads):
            for j, net in enumerate(head.nets):
                own = net.hidden.shape[1]
                self._hidden[i, j, :, :own] = net.hidden
                self._hidden_bias[i, j, 0, :own] = net.hidden_bias
                self._out[i, j, :own] = net.out
                self._skip[i, j] = net.skip
                self._out_bias[i, j, 0] = net.out_bias
                self._weight[i, j] = 1.0 / len(head.nets)

    def log_quantiles(self, rows: Floats32, anchors: Floats, group: str = "") -> Floats:
        """[heads, rows, K] from raw features [rows, features] and anchors [heads, rows]; they rise along K."""
        x = (rows - self._mean) / self._scale
        np.copyto(x, 0.0, where=np.isnan(x))
        np.clip(x, -self._limit, self._limit, out=x)
        x = x[:, None]
        inner = x @ self._hidden
        inner += self._hidden_bias
        np.maximum(inner, 0.0, out=inner)
        z = inner @ self._out
        z += x @ self._skip
        z += self._out_bias
        steps = np.sqrt(z * z + np.float32(4.0))
        steps += z
        steps *= np.float32(0.5)
        m = self._middle
        z[..., m + 1 :] = z[..., m : m + 1] + np.cumsum(steps[..., m + 1 :], axis=-1)
        z[..., :m] = z[..., m : m + 1] - np.cumsum(steps[..., m - 1 :: -1] if m else steps[..., :0], axis=-1)[..., ::-1]
        z *= self._weight
        q: Floats = z.sum(axis=1) + anchors[:, :, None]
        for i, shifts in enumerate(self._shifts):
            if shifts:
                own = shifts.get(group)
                q[i] = np.maximum.accumulate(q[i] + (shifts[""] if own is None else own), axis=1)
        return q

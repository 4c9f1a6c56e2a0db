"""The frozen splits of every experiment; `swarmx train` keeps to the same ones."""

from swarmx.neural.splits import Split, SplitBy, split_of

__all__ = ["Split", "SplitBy", "split_of"]

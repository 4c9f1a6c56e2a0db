"""What a run has used up, node by node and in all, and what the calls that are out still may: part of its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmx.workflows.events import Spent

_NOTHING = Spent()


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Sums by the paths of nodes, each with all that is inside it; "" is the whole run.

    `reserved` is what the calls that are out may come to, as far as a budget wanted to know.
    """

    spent: dict[str, Spent] = field(default_factory=dict)
    reserved: dict[str, Spent] = field(default_factory=dict)
    _out: dict[str, Spent] = field(default_factory=dict)

    def started(self, accounts: Sequence[str], most: Spent) -> None:
        """A call is out; `accounts` are its node's path, those around it from the inside out, and ""."""
        self._out[accounts[0]] = most
        for account in accounts:
            self.reserved[account] = self.reserved.get(account, _NOTHING) + most

    def ended(self, accounts: Sequence[str], spent: Spent | None) -> None:
        """The call is not out any more. One of which nothing is known counts as what was reserved for it."""
        most = self._out.pop(accounts[0], None)
        if most is not None:
            for account in accounts:
                self.reserved[account] -= most
                if self.reserved[account] == _NOTHING or not self._out:  # sums of money may come out beside zero
                    del self.reserved[account]
        charged = spent or most
        if charged is not None:
            for account in accounts:
                self.spent[account] = self.spent.get(account, _NOTHING) + charged

    def out(self, path: str) -> Spent | None:
        """What is reserved for the node's own call, if it is out and something is."""
        return self._out.get(path)

    def spent_by(self, account: str) -> Spent:
        return self.spent.get(account, _NOTHING)

    def reserved_by(self, account: str) -> Spent:
        return self.reserved.get(account, _NOTHING)

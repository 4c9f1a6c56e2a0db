"""The sequences that decode together: a step gives each of them a token, at a cost that does not depend on how many."""

from __future__ import annotations

from heapq import heapify, heappop, heappush


class DecodeBatch:
    """Counts steps instead of tokens: the context of a sequence is what it joined with and the steps since then.

    Context means the tokens that a sequence attends to: those in its cache, and the newest, which is not yet there.
    A sequence needs a block for its next step when its cache has filled all of its blocks.
    """

    def __init__(self, block_tokens: int) -> None:
        self.size = 0
        self._block_tokens = block_tokens
        self._step = 0
        self._offsets: dict[int, int] = {}  # context - step, by sequence
        self._offset = 0  # the sum of them
        self._fills = [0] * block_tokens  # sequences whose blocks are full when step % block_tokens is the index
        self._ends: list[tuple[int, int]] = []  # heap of (step after which a sequence is done, sequence)

    @property
    def context(self) -> int:
        """Tokens of context over all sequences."""
        return self._offset + self.size * self._step

    @property
    def steps_left(self) -> int:
        """Steps until the first of them is done; there is at least one."""
        return self._ends[0][0] - self._step

    def context_of(self, number: int) -> int:
        """Tokens of context of one sequence."""
        return self._offsets[number] + self._step

    def join(self, number: int, context: int, steps: int) -> None:
        """Take a sequence in that will be done after so many steps."""
        self.size += 1
        offset = self._offsets[number] = context - self._step
        self._offset += offset
        self._fills[(1 - offset) % self._block_tokens] += 1
        heappush(self._ends, (self._step + steps, number))

    def leave(self, number: int) -> None:
        """Let a sequence go. Cheap for the one that is done first; otherwise the cost grows with the batch."""
        self.size -= 1
        offset = self._offsets.pop(number)
        self._offset -= offset
        self._fills[(1 - offset) % self._block_tokens] -= 1
        if self._ends[0][1] == number:
            heappop(self._ends)
        else:
            self._ends = [end for end in self._ends if end[1] != number]
            heapify(self._ends)

    def done(self) -> int | None:
        """A sequence that is done, the one of the lowest number first."""
        return self._ends[0][1] if self._ends and self._ends[0][0] <= self._step else None

    def advance(self, steps: int) -> None:
        """Give each sequence so many tokens."""
        self._step += steps

    @property
    def next_growth(self) -> int:
        """Blocks that the next step needs beyond those that are there."""
        return self._fills[self._step % self._block_tokens]

    def growth(self, steps: int) -> int:
        """Blocks that so many steps need beyond those that are there."""
        rounds, rest = divmod(steps, self._block_tokens)
        start = self._step % self._block_tokens
        end = start + rest
        blocks = rounds * self.size + sum(self._fills[start:end])
        return blocks + sum(self._fills[: end - self._block_tokens]) if end > self._block_tokens else blocks

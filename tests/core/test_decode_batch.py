"""A batch that counts steps says the same as one that counts the tokens of each sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.decode_batch import DecodeBatch

BLOCK = 4


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


@given(
    changes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.booleans()), max_size=30),
    ahead=st.integers(1, 13),
)
def test_counting_steps_equals_counting_tokens(changes: list[tuple[int, int, bool]], ahead: int) -> None:
    batch = DecodeBatch(BLOCK)
    contexts: dict[int, int] = {}
    left: dict[int, int] = {}
    for number, (context, steps, leaves) in enumerate(changes):
        if leaves and contexts:
            gone = min(contexts, key=lambda n: (contexts[n] % 7, n))
            batch.leave(gone)
            del contexts[gone], left[gone]
        batch.join(number, context, steps)
        contexts[number], left[number] = context, steps
        taken = min(left.values())
        assert batch.steps_left == taken
        assert batch.growth(ahead) == sum(blocks(c - 1 + ahead) - blocks(c - 1) for c in contexts.values())
        assert batch.next_growth == batch.growth(1)
        if number % 3 == 0:
            continue
        batch.advance(taken)
        for n in contexts:
            contexts[n] += taken
            left[n] -= taken
        while (done := batch.done()) is not None:
            assert done == min(n for n, steps in left.items() if steps == 0)
            batch.leave(done)
            del contexts[done], left[done]
        assert all(steps > 0 for steps in left.values())
        assert (batch.size, batch.context) == (len(contexts), sum(contexts.values()))
        assert all(batch.context_of(n) == c for n, c in contexts.items())

"""Names of the beginnings of a prompt, so that routers can tell which replica has seen how much of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from hashlib import blake2b

BLOCK_BYTES = 256
MOST_BYTES = 16 * 1024 * 1024

_EXACT_BLOCKS = 64
_STEP = 16  # beyond the exact blocks, a name every sixteenth of the length


def _boundaries() -> tuple[int, ...]:
    """Blocks of the beginnings that have a name: every one up to 16 kB, then each a sixteenth longer than the last."""
    found = list(range(1, _EXACT_BLOCKS + 1))
    while found[-1] * BLOCK_BYTES < MOST_BYTES:
        found.append(found[-1] + max(1, found[-1] // _STEP))
    return tuple(found)


BOUNDARIES: tuple[int, ...] = _boundaries()
"""`prefix[i]` names the first `BOUNDARIES[i]` blocks; a shared beginning is known to one sixteenth of its length."""


def names_of(texts: Iterable[bytes], key: bytes = b"") -> tuple[int, ...]:
    """The names of a prompt that is these texts in a row: 63-bit hashes, each of everything up to its boundary.

    With a secret `key` nobody can make up two prompts of the same name.
    """
    whole = memoryview(b"".join(texts))
    blocks = len(whole) // BLOCK_BYTES
    if not blocks:
        return ()
    digest, found, at = blake2b(digest_size=8, key=key), list[int](), 0
    for boundary in BOUNDARIES:
        if boundary > blocks:
            break
        digest.update(whole[at : (at := boundary * BLOCK_BYTES)])
        found.append(int.from_bytes(digest.digest()) >> 1)
    return tuple(found)


def names_of_blocks(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a prompt whose every block has a name already, as in a simulation."""
    beyond = BOUNDARIES[_EXACT_BLOCKS : bisect_right(BOUNDARIES, len(blocks))]
    return (*blocks[:_EXACT_BLOCKS], *[blocks[count - 1] for count in beyond])

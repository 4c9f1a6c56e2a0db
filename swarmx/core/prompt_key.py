"""The name under which a recorded length belongs to a prompt: the recorder writes it, the emulator looks it up."""

from __future__ import annotations

from hashlib import sha256

_UNIT_SEPARATOR = "\x1f"  # cannot occur in a prompt that people write, so (a, bc) and (ab, c) stay apart


def prompt_key(system: str, user: str) -> str:
    """Return 16 hex digits that identify a role's instructions and the job put to it.

    Only the first paragraph of `user` counts, that is, the text before the first blank line. A workflow states the
    job there and puts what earlier steps produced below it; that part differs in every run, and a key over it would
    never match a recording. Space around the paragraph does not count either.
    """
    first_paragraph = user.strip().split("\n\n", 1)[0].strip()
    return sha256(f"{system}{_UNIT_SEPARATOR}{first_paragraph}".encode()).hexdigest()[:16]

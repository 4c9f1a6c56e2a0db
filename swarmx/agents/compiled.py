"""Compile a loop over arrays when whoever needs it is made, so that no decision waits for it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

_OPTIONS: dict[str, Any] = {"error_model": "numpy"}


def compiled(function: Callable[..., Any], signature: str, *example: Any) -> Callable[..., Any]:
    """The function as machine code for this signature, in the words of `numba.types`.

    It is kept beside its source, or where NUMBA_CACHE_DIR says, and made anew in each process where nothing can be
    kept. A division by zero gives what it gives an array; sums stay in the order in which they are written.

    What is returned takes arrays of this signature only, and does not look whether they are: whole numbers would be
    read as if they were floats, and what is not contiguous as if it were. Such a look, and an array that is returned
    rather than filled, take 15 us each where the caches are cold. It has been called with `example`.
    """
    [overload] = _made(function, signature).overloads.values()
    made: Callable[..., Any] = overload.entry_point
    made(*example)
    return made


def _made(function: Callable[..., Any], signature: str) -> Any:
    import numba  # half a second and 120 MiB, which only those pay who decide something

    with contextlib.suppress(Exception):  # a place that is full, broken or not ours must not keep a router from work
        return numba.njit(signature, cache=True, **_OPTIONS)(_known_by_its_constants(function))
    return numba.njit(signature, **_OPTIONS)(function)


def _known_by_its_constants(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, by a name that changes with the options and with the numbers of its module that it uses.

    They go into the machine code, and numba asks only whether the function's own file has changed.
    """
    assert isinstance(function, FunctionType)
    known = {name: value for name in function.__code__.co_names if _is_number(value := function.__globals__.get(name))}
    digest = hashlib.sha256(repr((known, _OPTIONS)).encode()).hexdigest()[:12]
    named = FunctionType(function.__code__, function.__globals__, function.__name__)
    named.__qualname__ = f"{function.__qualname__}_{digest}"
    return named


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)

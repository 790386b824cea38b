"""Inner loops compiled by numba where it is installed; the same code, interpreted, where it is not.

Only integers and arrays of integers pass through here, so both give identical results.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def _numba() -> Any:
    try:
        import numba
    except ImportError:  # no wheel for this Python: everything works, learning is slower
        return None
    return numba


numba = _numba()
COMPILED = numba is not None


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as machine code, kept on disk after the first call; it releases the GIL.

    What is kept is renewed when the function's own file changes, not when one that it calls in
    another file does: after work on `joining`, delete the `__pycache__` beside it.
    """
    if numba is None:
        return function
    try:
        fast = numba.njit(cache=True, nogil=True)(function)
        _go_on_where_nothing_can_be_kept(fast)
    except RuntimeError:  # no folder where machine code could be kept: compiled in each process
        fast = numba.njit(nogil=True)(function)
    return cast("Callable[P, R]", fast)


def _go_on_where_nothing_can_be_kept(fast: Any) -> None:
    """A full disk under the kept code is no reason to fail: `fast` is in memory by then."""
    with suppress(AttributeError):  # numba has no public way for this, so it may go away
        cache = fast._cache
        keep = cache.save_overload

        def keep_if_possible(*what: Any) -> None:
            with suppress(OSError):
                keep(*what)

        cache.save_overload = keep_if_possible

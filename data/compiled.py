"""Loops over pixels as machine code, where numba is installed."""

from collections.abc import Callable
from typing import Any

from modeling.optional import if_installed


def compiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function, compiled when it is first called and kept beside its file; None without numba."""
    numba = if_installed("numba")
    if numba is None:
        return None
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder that would keep it
        return numba.njit(nogil=True)(function)

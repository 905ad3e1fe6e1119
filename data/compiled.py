"""numba's decorators as this package uses them: compiled code is cached where a cache can be written."""

from collections.abc import Callable
from typing import Any

from numba import njit, vectorize


def loop(function: Callable[..., Any]) -> Any:
    """Compiles a function at its first call; it lets other threads run meanwhile."""
    return _cached(lambda cache: njit(function, nogil=True, cache=cache))


def elementwise(*signatures: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a numpy function of one that takes and returns single values, for these types, at once."""
    return lambda function: _cached(lambda cache: vectorize(list(signatures), cache=cache)(function))


def _cached(compiled: Callable[[bool], Any]) -> Any:
    try:
        return compiled(True)
    except RuntimeError as error:  # neither beside the file nor in the user's own folder
        if "cannot cache" not in str(error):
            raise
        return compiled(False)

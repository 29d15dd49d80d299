"""Inner loops in plain Python that numba compiles where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any


def compile_functions(
    functions: Sequence[Callable[..., Any]], namespace: Mapping[str, Any], *, nogil: bool = False
) -> dict[str, Any] | None:
    """The module's `namespace` with compiled `functions` in place of the plain ones; None where numba is not installed.

    Functions are in the order in which they need each other. Machine code is kept beside the module's byte code.
    `nogil`: other threads run meanwhile.
    """
    try:
        import numba
    except ImportError:
        return None
    # They find each other by name: copies that look in their own namespace find the compiled ones.
    names = dict(namespace)
    for function in functions:
        assert isinstance(function, FunctionType)
        copy = FunctionType(function.__code__, names, function.__name__)
        try:
            names[function.__name__] = numba.njit(cache=True, nogil=nogil)(copy)
        except RuntimeError:
            # No folder to keep machine code in: it is compiled again in every process.
            names[function.__name__] = numba.njit(nogil=nogil)(copy)
    return names

"""Describes in words what goes wrong with files."""

from __future__ import annotations

from .reader import DamageError

FAILURES = (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, DamageError)
"""What reading and writing raise. Anything else is a mistake of ours."""


def describe(error: BaseException) -> str:
    """Describe an error on one line; errors of ours and of the system speak for themselves."""
    if isinstance(error, (OSError, DamageError)):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())

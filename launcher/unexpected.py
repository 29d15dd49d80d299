"""The last handler of the command line: an error nobody foresaw, as one paragraph; the full trace lies in a file."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from .. import __version__
from ..errors import EXIT_RETRY
from .config.secrets import redact
from .env import secrets

DEBUG = "--debug"


def explain_unexpected(error: BaseException, words: list[str], *, debug: bool) -> str:
    """Return what to print about an unexpected error.

    Without `debug` the trace goes to a file of its own, for its owner alone, and the text says where it is.
    """
    trace = redact("".join(traceback.format_exception(error)), secrets())
    lines = redact(str(error), secrets()).strip().splitlines()
    reason = f"{type(error).__name__}{f': {lines[0][:300]}' if lines else ''}"
    if debug:
        return f"{trace}efflaunch: an unexpected error ({reason})"
    command = redact(" ".join(["efflaunch", *words]), secrets())
    text = f"efflaunch {__version__}, Python {sys.version.split()[0]}, {sys.platform}\n$ {command}\n\n{trace}"
    return (
        f"efflaunch: an unexpected error ({reason}). This is a fault of efflaunch or of the machine, not a mistake it knows. "
        f"{_kept(text)}; the same command with {DEBUG} shows it here. Please report it with that file."
    )


def _kept(text: str) -> str:
    try:
        handle, name = tempfile.mkstemp(prefix="efflaunch-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as failure:
        return f"The full trace could not be written ({failure.strerror or failure})"
    return f"The full trace is in {name}"


def report_unexpected(error: BaseException, words: list[str], *, debug: bool) -> int:
    """Print it on standard error; returns exit code 1."""
    print(explain_unexpected(error, words, debug=debug), file=sys.stderr)
    return EXIT_RETRY

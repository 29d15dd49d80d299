"""Errors that reach a person, and the exit codes that reach a scheduler."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_RETRY = 1
"""Exit code of anything unexpected: the agent retries it within its budget."""
EXIT_PREEMPTED = 75
"""Exit code of a run that saved and stopped when it was asked to: run the same command again to resume."""
EXIT_USER = 93
"""Will fail again in the same way: never restarted, never requeued."""


class EfflaunchError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = EXIT_RETRY


class UserError(EfflaunchError):
    """A mistake only the user can mend. One message: where, found, expected, what to type.

    `where` names the key, file or step; `found` and `expected` are clauses without a full stop;
    `hint` is what to type or to change next.
    """

    exit_code = EXIT_USER

    def __init__(self, where: str, *, found: str, expected: str, hint: str) -> None:
        self.where, self.found, self.expected, self.hint = where, found, expected, hint
        super().__init__(f"{where}: found {found}; expected {expected}.\n  Try: {hint}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not pickle by themselves, and errors cross processes here.
        return _rebuild, (type(self), self.where, self.found, self.expected, self.hint)


def _rebuild(kind: type[UserError], where: str, found: str, expected: str, hint: str) -> UserError:
    return kind(where, found=found, expected=expected, hint=hint)


class ConfigError(UserError):
    """The configuration does not say something that can be run."""


class PlanError(UserError):
    """A layout, a batch or a memory policy that cannot work; the hint names the nearest one that can."""


class DataError(UserError):
    """The corpus, a document or the tokenizer cannot be trained on."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or belongs to something else."""


class NonFiniteLossError(UserError):
    """The loss or the gradient norm stopped being a number; the last good checkpoint is kept."""

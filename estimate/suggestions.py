"""What would make a configuration fit: sets of overrides, each proven by the same ledger, and by the solver where it decides. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import PlanError, UserError
from ..units import format_bytes
from .build import build_ledger
from .ledger import Account, Ledger
from .plan_inputs import PlanInputs
from .solver.report import fixed_line
from .solver.solve import can_fit
from .suggestion_moves import HARDWARE, LAST, OTHERWISE, SETTINGS, TOGETHER, Change, Move


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """Overrides to type, in words what they do, and the ledger that shows they fit."""

    overrides: tuple[str, ...]
    reason: str
    ledger: Ledger

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)}  ({self.reason})"


_MIB = 1 << 20


def suggest(ledger: Ledger, *, most: int = 4, elsewhere: bool = True) -> tuple[Suggestion, ...]:
    """At most `most` override sets that fit, the least intrusive first.

    One of the run's own settings if one is enough, else all that save memory together; then other machines, and less to do.
    `elsewhere` False: nothing that asks for machines of another kind, for a directory nobody has named, or for another training.
    """
    if ledger.fits:
        return ()
    asked, barred = ledger.asked, () if elsewhere else HARDWARE
    suggestions = list(islice(_proven(asked, SETTINGS), most))
    base = _all_together(asked)
    if not suggestions and base.overrides:
        suggestions += filter(None, [_prove(base)])
    suggestions += islice(_proven(asked, [move for move in OTHERWISE if move not in barred]), most - len(suggestions))
    if not suggestions:
        suggestions += islice(_proven(asked, [move for move in LAST if move not in barred], base), most)
    return tuple(suggestions)


def _proven(asked: PlanInputs, moves: Iterable[Move], base: Change | None = None) -> Iterator[Suggestion]:
    """The first that fits of each kind of change, by itself or on top of `base`."""
    start = Change((), "", asked) if base is None else base
    for move in moves:
        fitting = (suggestion for change in move(start.inputs) if (suggestion := _prove(start.then(change))) is not None)
        yield from islice(fitting, 1)


def _prove(change: Change) -> Suggestion | None:
    try:
        inputs = change.inputs.with_parts()
        if inputs.memory.solve and not can_fit(inputs):
            return None
        ledger = build_ledger(inputs)
    except UserError:  # a layout that does not exist is no suggestion
        return None
    return Suggestion(overrides=change.overrides, reason=change.reason, ledger=ledger) if ledger.fits else None


def _all_together(asked: PlanInputs) -> Change:
    """All of the run's own settings that save memory."""
    base = Change((), "", asked)
    for move in TOGETHER:
        base = base.then(next(move(base.inputs), None))
    return base


def check_fits(ledger: Ledger) -> None:
    """PlanError where the solver found no policy that fits: what is there whatever the policy, the least that works, what to type."""
    report = ledger.report
    if report is None or report.feasible:
        return
    short = [account for account in ledger.accounts if not account.fits]
    missing = " and ".join(
        f"{format_bytes(account.peak_bytes - account.usable_bytes)} too little on each {_place(account)}" for account in short
    )
    options = [" ".join(entry.overrides) for entry in suggest(ledger, most=2)]
    if report.least_budget is not None:
        options.append(report.least_budget)
    raise PlanError(
        "memory.solve",
        found=f"no policy that fits: {missing} for the one that needs least; {fixed_line(report)}",
        expected="room for what no policy changes and for the smallest pieces of the rest",
        hint=", or ".join(options) or "more nodes, a smaller model or shorter sequences; efflaunch plan shows what takes the room",
    )


def check_budget(ledger: Ledger) -> None:
    """PlanError where a given policy moves more to the host than memory.host_budget allows. (A solved one is `check_fits`'s.)"""
    budget = ledger.budget
    if budget is None or budget.fits or ledger.inputs.memory.solve:
        return
    least = -(-budget.peak_bytes // _MIB)
    options = [" ".join(entry.overrides) for entry in suggest(ledger, most=2)]
    raise PlanError(
        "memory.host_budget",
        found=format_bytes(budget.capacity_bytes),
        expected=f"at least {format_bytes(budget.peak_bytes)} for what memory={ledger.inputs.memory.name} and optim.state_device put there "
        f"({', '.join(f'{entry.name} {format_bytes(entry.num_bytes)}' for entry in budget.terms)})",
        hint=", or ".join([f"memory.host_budget={least}MiB", *options]),
    )


def _place(account: Account) -> str:
    return {"host": "node"}.get(account.name, account.name)

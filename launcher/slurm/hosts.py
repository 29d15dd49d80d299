"""SLURM's lists of node names, `n[01-03,7],gpu1`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence


def expand_hosts(text: str) -> list[str]:
    """Every name, in order. ValueError for brackets that do not close."""
    return [name for part in _parts(text) for name in _expand(part)]


def _parts(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    depth, part = 0, ""
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            yield part
            part = ""
        else:
            part += letter
    if depth:
        raise ValueError(f"{text!r} is no list of nodes")
    if part:
        yield part


def _expand(part: str) -> Iterator[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)$", part)
    if match is None:
        yield part
        return
    before, ranges, after = match.groups()
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expand(after):
                yield f"{before}{number:0{len(first)}}{rest}"


def lost_hosts(hosts: Sequence[str], there: Sequence[str], reported: Sequence[bool]) -> list[str]:
    """Nodes of an attempt that are gone: no longer in the job, else those that left no report, unless none did.

    Where SLURM has noticed a lost node it has also killed what ran on the others, so these leave no report either.
    """
    gone = [host for host in hosts if there and host not in there]
    silent = [host for host, answer in zip(hosts, reported, strict=False) if not answer]
    return gone or (silent if len(silent) < len(hosts) else [])

"""Which attention heads a piece of work is about, and how heads fall into groups that are walked one after the other. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

HeadIndex = tuple[int, ...] | None
"""Heads by number; None: all of them; (): none."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, and key/value heads."""

    queries: HeadIndex = None
    keys: HeadIndex = None


ALL_HEADS, QUERIES, KEYS = Heads(), Heads(keys=()), Heads(queries=())


def head_groups(num_heads: int, num_kv_heads: int, *, num_groups: int, ulysses: int) -> tuple[Heads, ...]:
    """Groups that cover all query heads once; each has the same number of heads on every one of `ulysses` ranks.

    Of every rank's run of query heads, group g takes the g-th part, and the key/value heads those read (a key/value head
    may be in several groups). ConfigError where heads do not divide so. Untied Ulysses (2602.21196) walks heads like this.
    """
    if num_groups == 1:
        return (ALL_HEADS,)
    run, share = num_heads // ulysses, num_heads // num_kv_heads
    part = run // num_groups
    if run % num_groups or (part % share and share % part):
        divisors = [n for n in range(1, run + 1) if run % n == 0 and ((run // n) % share == 0 or share % (run // n) == 0)]
        raise ConfigError(
            "memory.head_groups",
            found=f"{num_groups} groups of {run} query heads on each of {ulysses} Ulysses ranks, {share} to a key/value head",
            expected=f"one of {', '.join(map(str, divisors))}",
            hint=f"memory.head_groups={max(n for n in divisors if n <= num_groups)}",
        )
    groups = []
    for group in range(num_groups):
        queries = [rank * run + group * part + i for rank in range(ulysses) for i in range(part)]
        groups.append(Heads(tuple(queries), tuple(dict.fromkeys(head // share for head in queries))))
    return tuple(groups)

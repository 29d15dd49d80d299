"""Which attention heads a piece of work is about, and how heads fall into groups that are walked one after the other. Pure."""

from __future__ import annotations

from dataclasses import dataclass

HeadIndex = tuple[int, ...] | None
"""Heads by number; None: all of them; (): none."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, and key/value heads."""

    queries: HeadIndex = None
    keys: HeadIndex = None


ALL_HEADS, QUERIES, KEYS = Heads(), Heads(keys=()), Heads(queries=())


def num_head_groups(num_heads: int, num_kv_heads: int, *, most: int, ulysses: int) -> int:
    """The largest number of groups up to `most` that the heads of one of `ulysses` ranks fall into evenly: each group has as many
    query heads, and whole runs of those that read one key/value head, or equal parts of one run."""
    run, share = num_heads // ulysses, num_heads // num_kv_heads
    even = (groups for groups in range(min(most, run), 0, -1) if run % groups == 0)
    return next(groups for groups in even if groups == 1 or (run // groups) % share == 0 or share % (run // groups) == 0)


def head_groups(num_heads: int, num_kv_heads: int, *, most: int, ulysses: int) -> tuple[Heads, ...]:
    """Groups that cover all query heads once; each has the same number of heads on every one of `ulysses` ranks.

    Of every rank's run of query heads, group g takes the g-th part, and the key/value heads those read (a key/value head
    may be in several groups). Untied Ulysses (2602.21196) walks heads like this.
    """
    num_groups = num_head_groups(num_heads, num_kv_heads, most=most, ulysses=ulysses)
    if num_groups == 1:
        return (ALL_HEADS,)
    run, share = num_heads // ulysses, num_heads // num_kv_heads
    part = run // num_groups
    groups = []
    for group in range(num_groups):
        queries = [rank * run + group * part + i for rank in range(ulysses) for i in range(part)]
        groups.append(Heads(tuple(queries), tuple(dict.fromkeys(head // share for head in queries))))
    return tuple(groups)

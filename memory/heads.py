"""Which attention heads a piece of work is about, and how heads fall into groups that are computed one after the other. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HeadIndex = tuple[int, ...] | None
"""Heads by number; None: all of them; (): none."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, and key/value heads."""

    queries: HeadIndex = None
    keys: HeadIndex = None


def head_runs(heads: Sequence[int]) -> tuple[slice, ...]:
    """`heads`, in their order, as runs of ones next to each other: views of a tensor, where a list would have to go to the device."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1][1] += 1
        else:
            runs.append([head, head + 1])
    return tuple(slice(start, stop) for start, stop in runs)


ALL_HEADS, QUERIES, KEYS = Heads(), Heads(keys=()), Heads(queries=())


def num_head_groups(num_heads: int, num_kv_heads: int, *, most: int, ulysses: int) -> int:
    """The largest number of groups up to `most` that the heads of one of `ulysses` ranks fall into evenly: each group has as many
    query heads, and as many of them read each of its key/value heads, in order."""
    run = num_heads // ulysses
    even = (groups for groups in range(min(most, run), 1, -1) if run % groups == 0)
    return next((groups for groups in even if all(_is_regular(part) for part in _parts(num_heads, num_kv_heads, groups, ulysses))), 1)


def head_groups(num_heads: int, num_kv_heads: int, *, most: int, ulysses: int) -> tuple[Heads, ...]:
    """Groups that cover all query heads once; each has the same number of heads on every one of `ulysses` ranks.

    Of every rank's run of query heads, group g takes the g-th part, and the key/value heads those read (a key/value head
    may be in several groups). Untied Ulysses (2602.21196) walks heads like this.
    """
    num_groups = num_head_groups(num_heads, num_kv_heads, most=most, ulysses=ulysses)
    if num_groups == 1:
        return (ALL_HEADS,)
    return tuple(
        Heads(tuple(queries), tuple(dict.fromkeys(keys))) for queries, keys in _parts(num_heads, num_kv_heads, num_groups, ulysses)
    )


_Part = tuple[list[int], list[int]]
"""Query heads of a group, and the key/value head each reads."""


def _parts(num_heads: int, num_kv_heads: int, num_groups: int, ulysses: int) -> list[_Part]:
    run, share = num_heads // ulysses, num_heads // num_kv_heads
    part = run // num_groups
    queries = [[rank * run + group * part + i for rank in range(ulysses) for i in range(part)] for group in range(num_groups)]
    return [(heads, [head // share for head in heads]) for heads in queries]


def _is_regular(part: _Part) -> bool:
    """Attention takes the i-th query head to read key/value head i // share."""
    _, keys = part
    unique = list(dict.fromkeys(keys))
    share, rest = divmod(len(keys), len(unique))
    return rest == 0 and keys == [key for key in unique for _ in range(share)]

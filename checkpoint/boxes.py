"""Cuts a run of a tensor's numbers, as engines that flatten parameters hold it, into boxes, as checkpoints hold it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a whole tensor whose numbers lie next to each other in a run."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    first: int
    """Number of the run that the box starts with."""

    @property
    def size(self) -> int:
        """Numbers in the box."""
        return math.prod(self.shape)


def boxes(shape: tuple[int, ...], begin: int, end: int) -> tuple[Box, ...]:
    """The fewest boxes of whole trailing dimensions that hold numbers begin ... end - 1 of a row-major tensor, in their order.

    At most 2 d - 1 for d dimensions: part of a first row, whole rows, part of a last one. ValueError for a run outside the tensor.
    """
    if not 0 <= begin <= end <= math.prod(shape):
        raise ValueError(f"numbers {begin} to {end} of {math.prod(shape)}")
    return tuple(_boxes(shape, begin, end, 0))


def _boxes(shape: tuple[int, ...], begin: int, end: int, first: int) -> list[Box]:
    if begin == end:
        return []
    if len(shape) < 2:
        return [Box((begin,) if shape else (), (end - begin,) if shape else (), first)]
    row = math.prod(shape[1:])
    found, at = [], begin
    while at < end:
        index, inside = divmod(at, row)
        rows = (end - at) // row if inside == 0 else 0
        if rows:
            found.append(Box((index, *(0,) * (len(shape) - 1)), (rows, *shape[1:]), first + at - begin))
            at += rows * row
            continue
        stop = min(end, (index + 1) * row)
        inner = _boxes(shape[1:], inside, inside + stop - at, first + at - begin)
        found += [Box((index, *box.offsets), (1, *box.shape), box.first) for box in inner]
        at = stop
    return found

"""Which tokens of a group each of its ranks holds. Pure: a function of the group's shape and its lengths.

Ring first, Ulysses inside: a sequence is cut into 2 x ring pieces and ring member i takes pieces i and
2 x ring - 1 - i (zigzag: equal causal work); the tokens of one ring member are then cut evenly, in order,
over its Ulysses ranks. Nothing is padded: pieces differ by one token where lengths do not divide.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens `start ... stop - 1` of the sequence at `sequence` in the group's own order."""

    sequence: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Slices = tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Who holds what in one group of `ulysses` x `ring` ranks; member m = ring_index * ulysses + ulysses_index."""

    lengths: tuple[int, ...]
    ulysses: int
    ring: int
    ring_slices: tuple[Slices, ...]
    """Per ring index: what its Ulysses ranks hold together, in the order attention sees."""
    member_slices: tuple[Slices, ...]
    """Per member: its own part, the rows that are resident outside attention."""

    def num_tokens(self, member: int) -> int:
        return sum(len(piece) for piece in self.member_slices[member])


def zigzag_slices(lengths: tuple[int, ...], ring: int, index: int) -> Slices:
    """The pieces ring member `index` of `ring` holds of each sequence; empty pieces are left out."""
    pieces = []
    for sequence, length in enumerate(lengths):
        cuts = [length * k // (2 * ring) for k in range(2 * ring + 1)]
        for k in (index, 2 * ring - 1 - index):
            if cuts[k] < cuts[k + 1]:
                pieces.append(Slice(sequence, cuts[k], cuts[k + 1]))
    return _merged(pieces)


def _merged(pieces: list[Slice]) -> Slices:
    # The two middle pieces of a zigzag touch: one block of attention is cheaper than two.
    out: list[Slice] = []
    for piece in pieces:
        if out and out[-1].sequence == piece.sequence and out[-1].stop == piece.start:
            out[-1] = Slice(piece.sequence, out[-1].start, piece.stop)
        else:
            out.append(piece)
    return tuple(out)


def split_slices(slices: Slices, parts: int) -> tuple[Slices, ...]:
    """`slices` cut in order into `parts` runs whose sizes differ by at most one token."""
    total = sum(len(piece) for piece in slices)
    cuts = [total * k // parts for k in range(parts + 1)]
    return tuple(cut_slices(slices, low, high) for low, high in pairwise(cuts))


def cut_slices(slices: Slices, start: int, stop: int) -> Slices:
    """The part of `slices` in rows [start, stop), rows counted over all of them in order."""
    out, row = [], 0
    for piece in slices:
        a, b = max(start, row), min(stop, row + len(piece))
        if a < b:
            out.append(Slice(piece.sequence, piece.start + a - row, piece.start + b - row))
        row += len(piece)
    return tuple(out)


def group_layout(lengths: tuple[int, ...], *, ulysses: int, ring: int) -> GroupLayout:
    """The layout of sequences of `lengths` tokens over ulysses x ring ranks."""
    ring_slices = tuple(zigzag_slices(lengths, ring, index) for index in range(ring))
    members = tuple(part for slices in ring_slices for part in split_slices(slices, ulysses))
    return GroupLayout(lengths, ulysses, ring, ring_slices, members)

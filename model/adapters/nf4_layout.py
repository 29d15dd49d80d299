"""Lays out one row of a matrix in NF4: what is where in its bytes, and how many there are. Pure, no torch.

Note: a row of its own. QLoRA (Dettmers et al., 2305.14314, sec. 3) quantises blocks of 64 numbers by their largest, and those scales, in
groups of 256, to 8 bits once more. Here blocks and groups end with each row: a rank quantises the rows it holds, and the numbers
are the same however many ranks there are, which is what a checkpoint that goes on elsewhere needs.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 64
"""Numbers that share a scale."""
GROUP = 256
"""Scales that share a mean and a range."""
STRIP_NUMBERS = 1 << 20
"""Numbers that are unpacked at one time (at least a row): what is needed beside the result is for these."""
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The bytes of one row of `columns` numbers: two 4-bit codes a byte, an 8-bit scale a block, mean and range of each group."""

    columns: int

    @property
    def blocks(self) -> int:
        """Blocks of the row; the last is filled up with zeros."""
        return -(-self.columns // BLOCK)

    @property
    def groups(self) -> int:
        """Groups of blocks; the last may be smaller."""
        return -(-self.blocks // GROUP)

    @property
    def scales(self) -> int:
        """First byte of the scales, after the codes."""
        return self.blocks * BLOCK // 2

    @property
    def ranges(self) -> int:
        """First byte of mean and range of each group (float32 each), on a multiple of their size."""
        return self.scales + _up(self.blocks, 4)

    @property
    def num_bytes(self) -> int:
        """All bytes of the row, on a multiple of 16."""
        return _up(self.ranges + 8 * self.groups, _ALIGNED)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

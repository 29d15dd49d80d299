"""Bytes of a row in NF4: codes, scales, and mean and range of each group, none of them on top of another."""

from __future__ import annotations

import pytest

from efflaunch.model.adapters.nf4_layout import RowLayout


@pytest.mark.parametrize(
    ("columns", "blocks", "groups", "num_bytes"),
    [(64, 1, 1, 48), (1, 1, 1, 48), (200, 4, 1, 144), (4096, 64, 1, 2128), (14336, 224, 1, 7408), (16384, 256, 1, 8464),
     (16448, 257, 2, 8512)],
)  # fmt: skip
def test_sizes(columns: int, blocks: int, groups: int, num_bytes: int) -> None:
    layout = RowLayout(columns)
    assert (layout.blocks, layout.groups, layout.num_bytes) == (blocks, groups, num_bytes)
    assert layout.scales == 32 * blocks and layout.ranges >= layout.scales + blocks and layout.ranges % 4 == 0
    assert layout.ranges + 8 * groups <= num_bytes < layout.ranges + 8 * groups + 16 and num_bytes % 16 == 0


def test_a_wide_row_takes_a_little_more_than_four_bits_a_number() -> None:
    assert 8 * RowLayout(4096).num_bytes / 4096 == pytest.approx(4.16, abs=0.01)
    assert 8 * RowLayout(28672).num_bytes / 28672 == pytest.approx(4.13, abs=0.01)

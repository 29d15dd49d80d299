"""Packs matrices in NF4 with doubly quantised scales, and unpacks them (Dettmers et al., 2305.14314, sec. 3 and appendix E).

A number is scale * level: one of 16 levels, quantiles of a normal distribution, and the scale of its block of 64, which is
mean + range * code / 127 with a code of 8 bits (nf4_layout.py). Codes are chosen for the scale as it will be read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .nf4_layout import BLOCK, GROUP, STRIP_NUMBERS, RowLayout

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # fmt: skip
"""What the codes 0 to 15 stand for."""


def byte_levels(device: torch.device | str | None = None) -> Tensor:
    """Both levels that a byte of codes stands for, (256, 2) in float32."""
    levels = torch.tensor(LEVELS)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1).to(device or "cpu")


@torch.no_grad()
def pack(weight: Tensor) -> Tensor:
    """A matrix (M, I) of any precision as bytes (M, `RowLayout(I).num_bytes`). Numbers must be finite."""
    layout = RowLayout(weight.shape[1])
    packed = torch.zeros(weight.shape[0], layout.num_bytes, dtype=torch.uint8, device=weight.device)
    for rows in strips(weight.shape[0], layout.columns):
        _pack_rows(weight[rows].float(), packed[rows], layout)
    return packed


def unpack(packed: Tensor, columns: int, dtype: torch.dtype, levels: Tensor) -> Tensor:
    """The matrix (M, columns) that `pack` made bytes of: computed in float32, rounded once to `dtype`. `levels`: `byte_levels`."""
    layout = RowLayout(columns)
    wide = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    for rows in strips(packed.shape[0], columns):
        numbers = F.embedding(packed[rows, : layout.scales].int(), levels).view(-1, layout.blocks, BLOCK)
        numbers.mul_(_scales(packed[rows], layout).unsqueeze(-1))
        wide[rows] = numbers.flatten(1)[:, :columns]
    return wide


def strips(rows: int, columns: int) -> list[slice]:
    """Runs of rows that are packed or unpacked together."""
    each = max(1, STRIP_NUMBERS // max(1, columns))
    return [slice(first, min(first + each, rows)) for first in range(0, rows, each)]


def _pack_rows(wide: Tensor, packed: Tensor, layout: RowLayout) -> None:
    blocks = F.pad(wide, (0, layout.blocks * BLOCK - layout.columns)).view(-1, layout.blocks, BLOCK)
    _pack_scales(blocks.abs().amax(-1), packed, layout)
    scales = _scales(packed, layout).unsqueeze(-1)
    # A block of zeros has the scale 0, and the level 0.
    relative = torch.where(scales > 0, blocks / scales, 0.0)
    levels = torch.tensor(LEVELS, device=wide.device)
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).flatten(1)
    packed[:, : layout.scales] = codes[:, ::2] << 4 | codes[:, 1::2]


def _pack_scales(scales: Tensor, packed: Tensor, layout: RowLayout) -> None:
    """Put the scales (M, blocks) where they belong, 8 bits each around the mean of their group."""
    for group in range(layout.groups):
        mine = slice(group * GROUP, min((group + 1) * GROUP, layout.blocks))
        mean = scales[:, mine].mean(1, keepdim=True)
        off = scales[:, mine] - mean
        widest = off.abs().amax(1, keepdim=True)
        codes = torch.where(widest > 0, off / widest * 127, 0.0).round().to(torch.int8)
        packed[:, layout.scales + mine.start : layout.scales + mine.stop] = codes.view(torch.uint8)
        first = layout.ranges + 8 * group
        packed[:, first : first + 8] = torch.cat((mean, widest), 1).view(torch.uint8)


def _scales(packed: Tensor, layout: RowLayout) -> Tensor:
    """The scale of each block as it is read, (M, blocks) in float32."""
    codes = packed[:, layout.scales : layout.scales + layout.blocks].contiguous().view(torch.int8).float()
    last = layout.ranges + 8 * layout.groups
    mean, widest = packed[:, layout.ranges : last].contiguous().view(torch.float32).unflatten(1, (-1, 2)).unbind(-1)
    if layout.groups > 1:
        each = torch.arange(layout.blocks, device=packed.device) // GROUP
        mean, widest = mean[:, each], widest[:, each]
    return (codes / 127 * widest + mean).clamp_(min=0)

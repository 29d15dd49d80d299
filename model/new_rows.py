"""Makes rows of embedding and head for tokens that a model's files lack: near the mean of the others, as transformers does.

Note: `resize_token_embeddings` (transformers 5, mean_resizing) draws them from the normal distribution with the mean and 1e-9 times
the covariance of the old rows. So do these, without the covariance (hidden size squared) or its root: with z of V independent
normals, z (W - mean) sqrt(1e-9 / V) has exactly that covariance, and W passes by once. Where there are fewer rows than columns the
covariance has no root and transformers takes the mean alone; these still spread, by 3e-5 of the rows' own spread.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

SPREAD = 1e-9
"""Variance of new rows over that of the old ones."""
CHUNK_NUMBERS = 16 << 20
"""Numbers of the old rows read at one time."""


def new_rows(saved: Any, num_rows: int, count: int, name: str) -> Tensor:
    """Make float32 rows (count, width) for a table whose `num_rows` old ones `saved` gives by slices, from those and `name` alone."""
    width = int(saved.get_shape()[1])
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{name}:new rows".encode()).digest()[:7], "big"))
    total, mixed = torch.zeros(width, dtype=torch.float64), torch.zeros(count, width, dtype=torch.float64)
    weight_sums = torch.zeros(count, 1, dtype=torch.float64)
    step = max(1, CHUNK_NUMBERS // width)
    for start in range(0, num_rows, step):
        rows = saved[start : min(start + step, num_rows)].to(torch.float64)
        normals = torch.randn(count, len(rows), generator=generator, dtype=torch.float64)
        total += rows.sum(0)
        mixed += normals @ rows
        weight_sums += normals.sum(1, keepdim=True)
    mean = total / num_rows
    return (mean + math.sqrt(SPREAD / num_rows) * (mixed - weight_sums * mean)).to(torch.float32)

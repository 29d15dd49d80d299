"""Which heads one call of an attention kernel takes where all of them are too many numbers for it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

INT32 = 1 << 31
ROWS_OF_TILE = 128
"""Rows that FlashAttention 2 pads each document to."""


def heads_of_call(rows: int, documents: int, head_dim: int) -> int:
    """Query heads whose gradients FlashAttention 2 counts in int32 before version 2.8: (rows + 128 documents) x heads x dim < 2^31.

    `rows`: of the longest document. Its accumulators have dims in steps of 32, and 256 beyond 192 (csrc/flash_attn/flash_api.cpp).
    ValueError where one head is too many.
    """
    dim = -(-head_dim // 32) * 32 if head_dim <= 192 else 256
    tiles = -(-rows // ROWS_OF_TILE) + documents
    most = (INT32 - 1) // (tiles * ROWS_OF_TILE * dim)
    if most == 0:
        raise ValueError(f"{rows} rows of head dim {head_dim} are beyond int32 for one head: flash-attn 2.8 or newer counts further")
    return most


def head_parts(num_heads: int, num_kv_heads: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Query heads, at most `most` at a time, and the key/value heads they read; whole groups of query heads where they fit."""
    share = num_heads // num_kv_heads
    if most >= share:
        step = most // share
        for key in range(0, num_kv_heads, step):
            stop = min(key + step, num_kv_heads)
            yield slice(key * share, stop * share), slice(key, stop)
        return
    for key in range(num_kv_heads):
        for query in range(key * share, (key + 1) * share, most):
            yield slice(query, min(query + most, (key + 1) * share)), slice(key, key + 1)

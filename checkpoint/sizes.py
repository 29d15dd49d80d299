"""Computes how much host memory snapshots take. Pure: the memory ledger calls it too."""

from __future__ import annotations

SEGMENT_BYTES = 16 << 20
"""What is copied, hashed and written at a time; also the chunk of a manifest."""
BLOCK_BYTES = 4096
"""Direct writes are multiples of it."""
_LEAST_BYTES = 64 << 10
MIN_SEGMENTS = 2
"""One is filled while the other is written."""


def segment_bytes(state_bytes: int, largest: int = SEGMENT_BYTES) -> int:
    """Bytes of a segment: an eighth of a small state, in whole blocks, so that its pool is not larger; `largest` for others."""
    return min(largest, max(_LEAST_BYTES, -(-state_bytes // 8 // BLOCK_BYTES) * BLOCK_BYTES))


def snapshot_pool_bytes(
    state_bytes: int, pool_bytes: int | None = None, *, free_bytes: int | None = None, segment: int | None = None
) -> int:
    """Host bytes of one rank's snapshot pool: `pool_bytes`, or its whole state where None; whole segments, at least two.

    `state_bytes`: parameters and optimizer states of this rank, as stored. `free_bytes`: free host memory per rank, of
    which the automatic size takes at most half. A smaller pool saves memory and makes wait_for_snapshot() wait for storage.
    """
    size = segment or segment_bytes(state_bytes)
    wanted = pool_bytes
    if wanted is None:
        wanted = state_bytes if free_bytes is None else min(state_bytes, free_bytes // 2)
    # The whole state and a little more never needs more segments than the state has.
    segments = min(-(-wanted // size), -(-state_bytes // size) + 1)
    return max(MIN_SEGMENTS, segments) * size


def replica_bytes(state_bytes: int, ranks_per_node: int, *, several_nodes: bool) -> int:
    """Host bytes of one node for images that outlive the ranks (checkpoint.replica=peer); the same on every node.

    Of each image, the whole one and the one that arrives; of each rank, its own node's and the next node's (replica/plan.py).
    """
    return 2 * state_bytes * ranks_per_node * (2 if several_nodes else 1)

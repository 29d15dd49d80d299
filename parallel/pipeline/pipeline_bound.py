"""A lower bound of a pipeline's step, for every schedule and partition of a problem. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .simulate import Floats
from .slices import slice_work
from .work import PAIR_BACKWARD, Batch, LayerLoad, ModelLoad


def lower_bound_s(model: ModelLoad, batch: Batch, ranks: int, cuts: Sequence[Sequence[Sequence[int]]]) -> float:
    """The larger of two times, both without messages and recomputation.

    All work shared evenly over the ranks, with what they must wait: the rank with the i-th earliest stage starts when at least i layers
    before it have had one slice, and ends when its gradients have gone back through as many. And the slowest slice's way forward through
    all layers and back. `cuts`: every way in which micro-batches may be sliced, as the tokens of each one's slices.
    """
    ends = (model.embedding, *model.layers, model.head)
    every = [_rows(batch, sizes) for sizes in cuts]
    total = sum(float(_seconds(one, *every[0], weights=True).sum()) for one in ends)
    least = min(float(_seconds(one, *rows).min()) for rows in every for one in set(model.layers))
    fill = least * ranks * (ranks - 1) / 2
    way = min(float(np.sum([_seconds(one, *rows) for one in ends], axis=0).max()) for rows in every)
    return max((total + fill) / ranks, way)


def _rows(batch: Batch, sizes: Sequence[Sequence[int]]) -> tuple[Floats, Floats]:
    """Tokens and pairs of each slice of each micro-batch. Shape (micro-batches, slices)."""
    pairs = [slice_work(documents, size, 0.0, 1.0) for documents, size in zip(batch.micro_batches, sizes, strict=True)]
    return np.array(sizes, dtype=np.float64), np.array(pairs)


def _seconds(layer: LayerLoad, tokens: Floats, pairs: Floats, weights: bool = False) -> Floats:
    """Forward and backward of one layer, of each slice of each micro-batch."""
    return (2 + weights) * layer.token_s * tokens + (1 + PAIR_BACKWARD) * layer.pair_s * pairs

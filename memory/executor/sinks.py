"""A layer's attention sinks: which of them a part of attention reads, and where their gradients go.

Note: once for each row and head. Between the exchanges every rank has other rows or other heads, chunks have other rows and head groups
other heads. Each attention backward adds its own part, and the engine sums over ranks as it does for any parameter: whatever runs
forward again adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..heads import ALL_HEADS, Heads, head_runs
from .layer_pass import AttentionRuntime
from .token_local import GradientSums, LayerSteps


def sinks_of(adapter: LayerSteps, heads: Heads = ALL_HEADS) -> Tensor | None:
    """The sinks of the query heads in `heads` as they are now, in that order; None of a layer that has none."""
    sinks = adapter.sinks
    return sinks if sinks is None or heads.queries is None else torch.cat([sinks[run] for run in head_runs(heads.queries)])


def sinks_backward(
    adapter: LayerSteps, attention: AttentionRuntime, do: Tensor, o: Tensor, lse: Tensor, sums: GradientSums, heads: Heads = ALL_HEADS
) -> None:
    """Add to `sums` what do, o and lse of `heads`, all between the exchanges, make of the sinks' gradient; nothing where none is trained.

    It comes before attention's own backward, whose gradients then do not lie beside what this works with.
    """
    parameter, sinks = adapter.sinks, sinks_of(adapter, heads)
    if parameter is None or sinks is None or not parameter.requires_grad:
        return
    part = attention.sinks_backward(do, o, lse, sinks)
    if heads.queries is not None:
        part = _spread(part, heads.queries, parameter.shape)
    sums.add_of(parameter, part)


def _spread(part: Tensor, heads: Sequence[int], shape: torch.Size) -> Tensor:
    """Gradients of all heads from those of `heads`; 0 for the others."""
    whole, runs = part.new_zeros(shape), head_runs(heads)
    for run, own in zip(runs, part.split([run.stop - run.start for run in runs]), strict=True):
        whole[run] = own
    return whole

"""The dense feed-forward of a layer: gate and up from one norm, the product of both through one projection back.

Note: mirrored in estimate/footprint/{live_layer,weights}.py (bytes while it runs) and in the table of ../activation_classes.py
(`DENSE`: classes and FLOPs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation_classes import DENSE, GATE_UP
from .token_local import GradientSums, LayerSteps, SavedPiece, Step

MLP_IN, MLP_OUT = Step("mlp_in"), Step("mlp_out")
"""(T, M) -> gate and up (T, I) each; (T, M) with gate and up -> the layer's output (T, M), the sum with its input inside."""


class DenseFeedForward:
    """A `FeedForward` of two steps of a family's adapter: `mlp_in` and `mlp_out`."""

    classes = DENSE.classes

    def __init__(self, steps: LayerSteps) -> None:
        """`steps` run as they are or compiled."""
        self._steps = steps

    def forward(self, rows: Tensor, saved: SavedPiece) -> Tensor:
        """As `FeedForward.forward`."""
        gate, up = self._gate_up(rows, saved)
        saved.put(GATE_UP, (gate, up))
        return self._steps.run_step(MLP_OUT, (rows, gate, up))[0]

    def backward(self, rows: Tensor, dy: Tensor, saved: SavedPiece, sums: GradientSums) -> Tensor:
        """As `FeedForward.backward`."""
        with torch.no_grad():
            gate, up = self._gate_up(rows, saved)
        d_rows, *d_inner = self._steps.pull_back(MLP_OUT, (rows, gate, up), (), (dy,), sums)
        # Two thirds of what is alive here: gone before the norm's backward makes its own.
        del gate, up
        (through,) = self._steps.pull_back(MLP_IN, (rows,), (), d_inner, sums)
        del d_inner
        # `d_rows` may be dy itself, whose memory others read still; `through` is nobody else's.
        return through.add_(d_rows)

    def _gate_up(self, rows: Tensor, saved: SavedPiece) -> tuple[Tensor, ...]:
        stored = saved.get(GATE_UP)
        return self._steps.run_step(MLP_IN, (rows,)) if stored is None else stored

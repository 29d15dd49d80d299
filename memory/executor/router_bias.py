"""The biases by which experts are chosen and not weighed, and their update after each step: balance without a loss.

After a step, with c_i the rows that all ranks and micro-batches sent to expert i and c their mean: b_i += rate x sign(c - c_i)
(arXiv:2408.15664, section 3; DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

Note: no gradient. A bias is a buffer of Hugging Face's router: state that checkpoints keep and exports have, no weight. Every rank has
all of them and makes the same update from the same counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class RouterBiases:
    """The biases (E,) of a model's routers by layer, and the step by which an update moves them."""

    def __init__(self, biases: Mapping[int, Callable[[], Tensor]], rate: float = 0.0) -> None:
        """`biases`: how to find each layer's as it is now; they move to other memory while a model is built."""
        self._biases, self.rate = dict(biases), rate

    @torch.no_grad()
    def update(self, counts: Tensor, layers: Sequence[int]) -> None:
        """Move every bias by `rate` towards even use; `counts` (L, E) of all ranks in the whole step, by the layers of these numbers."""
        if not self.rate:
            return
        # Whole numbers: a sign is never a rounding's.
        wanted = torch.sign(counts.sum(1, keepdim=True) - counts * counts.shape[1])
        for layer, direction in zip(layers, wanted, strict=True):
            bias = self._biases[layer]()
            bias.add_(direction.to(bias.dtype), alpha=self.rate)

    def largest(self) -> float | None:
        """The largest bias of all, by its size; None where there is none."""
        found = [bias() for bias in self._biases.values()]
        return float(torch.stack([bias.abs().max() for bias in found]).max()) if found else None

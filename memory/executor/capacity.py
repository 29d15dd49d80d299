"""Most rows that an expert takes of one document: what is beyond is dropped, and its token keeps the residual alone.

The rule, for each layer: of a document of n tokens an expert takes ceil(factor x K x n / E) rows at most (GShard, arXiv:2006.16668, with
the group of tokens a document), those of the earliest tokens. Weights are those of all K choices: what remains is not renormalised.

Note: why documents, and positions. A capacity of a rank's tokens, or a micro-batch's, would be another function for every layout. A
document is the same on all of them. Were heavier rows served first, a later token could take an earlier one's place: what a token
becomes would follow from tokens after it, which no language model has when it generates.

Note: every row of a document must pass here in order, so documents are whole on a rank (training/config.py refuses other layouts).

Legend: T tokens of a piece, K experts of a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Capacity:
    """What is left of the experts' room while a micro-batch goes forward, piece after piece through each layer."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._documents = self._limits = torch.zeros(0, dtype=torch.int64)
        self._lengths = torch.zeros(0, dtype=torch.float64)
        self._rows: dict[int, int] = {}
        self._taken: dict[int, Tensor] = {}

    def begin(self, position_ids: Tensor, document_lengths: Tensor) -> None:
        """Start a micro-batch of whole documents one after the other; both (T,), of all its rows here."""
        self._documents = (position_ids == 0).cumsum(0) - 1
        self._lengths = document_lengths.double()
        self._rows.clear()
        self._taken.clear()

    def keep(self, layer: int, chosen: Tensor, num_experts: int) -> Tensor:
        """`chosen` (T, K) of the layer's next rows, with ~expert, which is below 0, where there is no room."""
        start = self._rows.get(layer, 0)
        self._rows[layer] = stop = start + len(chosen)
        if start == stop:
            return chosen
        documents = self._documents[start:stop]
        limits = (self._lengths[start:stop] * (self.factor * chosen.shape[1] / num_experts)).ceil().long()
        keys = ((documents - documents[0]).unsqueeze(1) * num_experts + chosen).flatten()
        numbers = _occurrences(keys) + self._before(layer, documents, keys, num_experts)
        self._count(layer, documents, keys, num_experts)
        return torch.where(numbers.view(chosen.shape) < limits.unsqueeze(1), chosen, ~chosen)

    def _before(self, layer: int, documents: Tensor, keys: Tensor, num_experts: int) -> Tensor:
        """Rows that each key's expert was asked to take of its document in pieces before."""
        taken = self._taken.get(layer)
        if taken is None or int(documents[0]) != int(taken[-1]):
            return torch.zeros_like(keys)
        return torch.where(keys < num_experts, taken[keys.clamp(max=num_experts - 1)], 0)

    def _count(self, layer: int, documents: Tensor, keys: Tensor, num_experts: int) -> None:
        """Remember what the last document of a piece asked for so far, and its number."""
        last = documents[-1]
        first_key = (last - documents[0]) * num_experts
        own = torch.bincount((keys[keys >= first_key] - first_key), minlength=num_experts)
        taken = self._taken.get(layer)
        if taken is not None and int(taken[-1]) == int(last):
            own = own + taken[:-1]
        self._taken[layer] = torch.cat([own, last.unsqueeze(0)])


def _occurrences(keys: Tensor) -> Tensor:
    """How many equal ones there are before each key (N,)."""
    order = torch.argsort(keys, stable=True)
    _, counts = torch.unique_consecutive(keys[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    numbers = torch.empty_like(keys)
    numbers[order] = torch.arange(len(keys), device=keys.device) - starts
    return numbers

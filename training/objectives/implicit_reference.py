"""Computes DPO's reference where a run trains adapters: the same weights without them, one forward pass more of each step.

Nothing is kept for it: no second model, and no file of a pass over the corpora. So a run that resumes still has its reference, as the
frozen weights are never other ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from ...model.build import without_adapters
from ...model.chunked_loss import chunked_log_probs
from ..forward_only import forward_only
from ..micro_batches import MicroBatchWork
from ..step_setup import StepSetup
from .preference import sum_by


def pair_reference(setup: StepSetup, works: Sequence[MicroBatchWork], num_pairs: int) -> np.ndarray:
    """Log-probabilities (P, 2) float64 of both answers of the step's pairs under the frozen model alone. Collective over all ranks."""
    sums = torch.zeros(2 * num_pairs, dtype=torch.float64, device=setup.device)
    with without_adapters(setup.model):
        scored = forward_only(setup, works, lambda work: chunked_log_probs)
    for work, log_probs in scored:
        sides = torch.from_numpy(work.shard.by_row(lambda part: 2 * part.sequence + part.number))
        sums += sum_by(sides.to(setup.device), log_probs, len(sums))
    dist.all_reduce(sums, group=setup.topology.world)
    return sums.view(-1, 2).cpu().numpy()

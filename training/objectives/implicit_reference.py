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
from ...model.stage import stage_of
from ...parallel.sequence.clock import BusyClock
from ...parallel.sequence.runtime import sequence_attention
from ..micro_batches import MicroBatchWork, to_tokens
from ..step_setup import StepSetup
from .preference import sum_by


@torch.no_grad()
def pair_reference(setup: StepSetup, works: Sequence[MicroBatchWork], num_pairs: int) -> np.ndarray:
    """Log-probabilities (P, 2) float64 of both answers of the step's pairs under the frozen model alone. Collective over the stage."""
    sums = torch.zeros(2 * num_pairs, dtype=torch.float64, device=setup.device)
    weights = stage_of(setup.model).weights
    with without_adapters(setup.model):
        for work in works:
            clock = BusyClock(setup.device)
            attention = sequence_attention(setup.topology, setup.kernel, work.group, work.layout, clock, work.rank_tokens)
            log_probs = weights.forward(to_tokens(work, setup.device), attention, chunked_log_probs)
            sides = torch.from_numpy(work.shard.by_row(lambda part: 2 * part.sequence + part.number))
            sums += sum_by(sides.to(setup.device), log_probs, len(sums))
    dist.all_reduce(sums, group=setup.topology.stage)
    return sums.view(-1, 2).cpu().numpy()

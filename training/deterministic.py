"""Has torch compute the same bits from the same numbers, where the configuration asks for it.

Variables that libraries read when they are loaded are set before (launcher/env.py): of cuBLAS, NCCL and torch's compiler.
"""

from __future__ import annotations

import torch
from torch.utils import deterministic as torch_deterministic


def compute_in_order(*, deterministic: bool) -> None:
    """Have every operator of this process add in the same order each time, and raise where one cannot; with False nothing changes.

    Memory that is not written yet is not filled, as torch would: nothing here reads such (tests/memory/offload/late.py).
    """
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch_deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

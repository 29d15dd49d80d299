"""The cost model FlexSP (arXiv 2412.01523) published: GPT-7B with 384K positions on A100-40GB, eight to a node."""

from __future__ import annotations

from ..parallel.sequence.cost import CostModel, DegreeCost

BANDWIDTH = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
"""MiB/ms of an all-to-all among so many A100s, from the public code's profile."""
MEMORY_MIB, TOKEN_MIB, PARAMETERS_GI = 30 * 1024, 4.480441895, 7.8498687744
"""Usable memory, of one token, and parameters (x 2^30) of GPT-7B with 384K positions; ZeRO-3, 16 bytes a parameter."""


def flexsp_a100_7b(world_size: int) -> CostModel:
    """GPT-7B, 384K context, A100-40GB: the paper's fitted constants. Groups up to 64; larger ones were never measured."""
    tokens = int((MEMORY_MIB - PARAMETERS_GI * 16 * 1024 / world_size) / TOKEN_MIB)
    return CostModel(
        world_size=world_size,
        tokens_per_rank=tokens,
        degrees=tuple(_published(1 << i) for i in range(7) if 1 << i <= world_size),
        excluded=tuple((1 << i, "never measured by FlexSP") for i in range(7, world_size.bit_length())),
        beta_s=0.6293563,
        source="FlexSP, GPT-7B 384K on A100-40GB",
    )


def _published(degree: int) -> DegreeCost:
    """Ulysses only: four tensors of 32 layers x 4096 numbers of two bytes, forward and backward."""
    exchanged_mib = 4 * 2 * 32 * 4096 * 2 / 2**20
    exchange_s = exchanged_mib / degree / BANDWIDTH[degree] / 1e3 if degree > 1 else 0.0
    return DegreeCost(degree=degree, ulysses=degree, attention_s=5.128e-9 / degree, linear_s=183.9576e-6 / degree, exchange_s=exchange_s)

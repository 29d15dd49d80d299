"""What a configuration asks of its attention kernel. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout
from ..parallel.sequence.kernel_choice import AttentionCase, Installed, KernelChoice, choose_kernel

if TYPE_CHECKING:
    from ..model.spec import ModelSpec


def attention_case(spec: ModelSpec, layout: Layout, *, dtype: str, max_seq_len: int) -> AttentionCase:
    """The case of the longest document in the largest group: rows of one ring member, query heads of one Ulysses rank."""
    longest = min(max_seq_len, layout.tokens_per_rank * layout.sp_degree)
    return AttentionCase(
        dtype=dtype,
        head_dim=spec.head_dim,
        num_heads=spec.num_heads // layout.ulysses,
        rows=-(-longest // layout.ring),
        softcap=spec.has_score_softcap,
        windows=any(window is not None and window < longest for window in spec.windows),
    )


def attention_kernel(
    spec: ModelSpec, layout: Layout, parallel: ParallelConfig, installed: Installed | None, *, dtype: str, max_seq_len: int
) -> KernelChoice:
    """The kernel that parallel.attention_kernel comes to where this is installed (None: on the CPU); ConfigError where none can."""
    return choose_kernel(parallel.attention_kernel, attention_case(spec, layout, dtype=dtype, max_seq_len=max_seq_len), installed)

"""What a configuration asks of its attention kernel. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from ..cluster.attention_rates import CAPABILITIES, RatedKernel
from ..errors import ConfigError
from ..parallel.config import AttentionKernel, ParallelConfig
from ..parallel.layout import Layout
from ..parallel.sequence.kernel_choice import AttentionCase, Installed, KernelChoice, choose_kernel

if TYPE_CHECKING:
    from ..model.spec import ModelSpec


def attention_case(spec: ModelSpec, layout: Layout, *, dtype: str, max_seq_len: int, deterministic: bool) -> AttentionCase:
    """The case of the longest document in the largest group: rows of one ring member, query heads of one Ulysses rank."""
    longest = min(max_seq_len, layout.tokens_per_rank * layout.sp_degree)
    return AttentionCase(
        dtype=dtype,
        head_dim=spec.head_dim,
        num_heads=spec.num_heads // layout.ulysses,
        rows=-(-longest // layout.ring),
        softcap=spec.has_score_softcap,
        windows=any(window is not None and window < longest for window in spec.windows),
        deterministic=deterministic,
    )


def attention_kernel(
    spec: ModelSpec,
    layout: Layout,
    parallel: ParallelConfig,
    installed: Installed | None,
    *,
    dtype: str,
    max_seq_len: int,
    deterministic: bool,
) -> KernelChoice:
    """The kernel that parallel.attention_kernel comes to where this is installed (None: on the CPU); ConfigError where none can."""
    case = attention_case(spec, layout, dtype=dtype, max_seq_len=max_seq_len, deterministic=deterministic)
    return choose_kernel(parallel.attention_kernel, case, installed)


_LEAST_CAPABILITY = (8, 0)
"""Of a GPU nobody has named: every kernel it runs runs on the others too."""


@lru_cache(maxsize=64)  # asked for by terms of every policy the solver looks at
def estimated_kernel(asked: AttentionKernel, case: AttentionCase, gpu: str | None) -> RatedKernel:
    """The kernel that estimates are made for: `asked`, or with `auto` what a run takes on `gpu` (cluster.gpu) with torch alone.

    A softcap takes flash-attn, which nothing else has. What no kernel of half precision can do is estimated as torch's.
    """
    if asked is not AttentionKernel.AUTO:
        return RatedKernel(asked.value)
    versions = {RatedKernel.FA2.value: "2.8"} if case.softcap else {}
    try:
        choice = choose_kernel(asked, case, Installed(versions, CAPABILITIES.get(gpu or "", _LEAST_CAPABILITY)))
    except ConfigError:  # that no kernel can do it is said where kernels are looked for
        return RatedKernel.SDPA
    known = {kernel.value: kernel for kernel in RatedKernel}
    return known.get(choice.kernel, RatedKernel.SDPA)

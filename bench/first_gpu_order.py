"""The section of bench/first_gpu.py about train.deterministic: whether kernels repeat their bits, and what that takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..parallel.sequence.attention import AttentionSpec, BlockKernel
from ..parallel.sequence.blocks import Block
from ..parallel.sequence.kernel_choice import AttentionCase
from ..training.deterministic import compute_in_order
from .first_gpu_kernels import FAILURES, kernels_for
from .gpu_section import Row, Scale

TIMES = 4
HEADS = (4, 1)
"""Query and key heads of a rank of eight: few, so that FlashAttention 2 makes most parts of queries' gradient."""


def order(scale: Scale) -> Row:
    """Backward of every kernel, told to add in one order or not: how often the bits differ, seconds, and the most bytes it takes."""
    device, dtype = torch.device(scale.device), torch.float32 if scale.device == "cpu" else torch.bfloat16
    rows, dim = scale.pick(16 << 10, 64), scale.pick(128, 16)
    found: dict[str, Any] = {}
    try:
        for deterministic in (False, True):
            compute_in_order(deterministic=deterministic)
            case = AttentionCase(str(dtype).removeprefix("torch."), dim, HEADS[0], rows, deterministic=deterministic)
            for name, kernel in kernels_for(device, case):
                found[f"{name}, {'in order' if deterministic else 'free'}"] = _repeated(kernel, rows, dim, device, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    in_order = [row for name, row in found.items() if name.endswith("in order") and "differ" in row]
    return {"kernels": found, "ok": bool(in_order) and not any(row["differ"] for row in in_order)}


def _repeated(kernel: BlockKernel | str, rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> Row:
    """The same block's gradients TIMES times; why not, where the kernel cannot be had."""
    if isinstance(kernel, str):
        return {"refused": kernel}
    spec, block = AttentionSpec(*HEADS, dim, dim**-0.5), Block(0, rows, 0, rows, 0, causal=True, windowed=False)
    torch.manual_seed(0)
    q, do = (torch.randn(rows, HEADS[0], dim, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(rows, HEADS[1], dim, device=device).to(dtype) for _ in range(2))
    try:
        o, lse = kernel.forward(q, k, v, block, spec)
        first = kernel.backward(do, q, k, v, o, lse, block, spec)
        before = _bytes_now(device)
        begun, differ = time.perf_counter(), 0
        for _ in range(TIMES):
            differ += not _equal(first, kernel.backward(do, q, k, v, o, lse, block, spec))
        return {"differ": differ, "backward_s": (time.perf_counter() - begun) / TIMES, "most_bytes": _most_bytes(device) - before}
    except FAILURES as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Whether all bits are the same; waits for the device."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _bytes_now(device: torch.device) -> int:
    """Bytes that are allocated, from which on the most are counted anew; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _most_bytes(device: torch.device) -> int:
    """The most bytes that were allocated since `_bytes_now`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

"""Sections of bench/first_gpu.py about single operations: rotary tables and attention kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..errors import ConfigError
from ..model.families.rope import rotary_tables
from ..parallel.sequence.attention import AttentionSpec, BlockKernel, MaskedKernel, attention_backward, attention_forward
from ..parallel.sequence.blocks import Block, Calls, Documents, attention_blocks, join_documents
from ..parallel.sequence.kernel_choice import FACTS, AttentionCase, KernelChoice, choose_kernel
from ..parallel.sequence.kernels import block_kernel, installed_on
from ..parallel.sequence.layout import group_layout
from .gpu_section import Row, Scale

QKVD = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, k, v and the gradient of the output."""
TOLERANCE = 0.02
"""Relative error of a bfloat16 block against float64; rounding alone gives about 0.004."""


FAILURES = (RuntimeError, ImportError, TypeError, ValueError, AttributeError, ConfigError)
"""What a library may raise where it is called as it does not like."""


def kernels_for(device: torch.device, case: AttentionCase) -> Iterator[tuple[str, BlockKernel | str]]:
    """Every kernel there is by name, from the fastest, or why it cannot be had for `case`.

    Each is put in place when it is taken and to be used before the next: torch's registry has one at a time.
    """
    if device.type == "cpu":
        yield "cpu", block_kernel(device)
        return
    installed = installed_on(device)
    for asked in FACTS:
        try:
            kernel: BlockKernel | str = block_kernel(device, choose_kernel(asked, case, installed))
        except ConfigError as error:
            kernel = error.found
        yield asked.value, kernel


def rope(scale: Scale) -> Row:
    """The worst error of our tables at the last positions, by precision of matrix products; corrupt positions are off by more than 0.1."""
    device, count = torch.device(scale.device), scale.pick(4096, 64)
    fields: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128, "max_position_embeddings": 1 << 20}
    config = LlamaConfig(**fields, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    rotary = LlamaRotaryEmbedding(config).to(device)
    positions = torch.arange((1 << 20) - count, 1 << 20, device=device)
    exact = (positions.double().unsqueeze(1) * rotary.inv_freq.double()).cos()
    before, errors = torch.get_float32_matmul_precision(), {}
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            like = torch.zeros(1, device=device)
            cos, _ = rotary_tables(rotary, like, positions, torch.full_like(positions, 1 << 20))[None]
            errors[precision] = float((cos[:, :64].double() - exact).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    return {"errors": errors, "ok": max(errors.values()) < 0.1}


def _inputs(rows: int, keys: int, heads: tuple[int, int], dim: int, device: torch.device, dtype: torch.dtype) -> QKVD:
    """Random q (T, H, D) and do, k and v (S, K, D), q a view of something wider, as an exchange leaves it."""
    torch.manual_seed(rows + keys)
    shapes = ((rows, 2 * heads[0], dim), (keys, heads[1], dim), (keys, heads[1], dim), (rows, heads[0], dim))
    q, k, v, do = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return q[:, : heads[0]], k, v, do


SHAPES = (
    (1000, 1000, True, None), (300, 777, False, None), (1000, 1000, True, 128), (300, 777, False, 900), (1, 5, False, None),
    (1, 1, True, None),
)  # fmt: skip
"""Rows, keys, causal, window of each kind of block there is."""
LENGTHS = (300, 10, 1, 689)
"""Rows of documents that are joined in one call."""
WINDOWS = (None, 128)
"""Windows of joined documents."""


def attention(scale: Scale) -> Row:
    """The worst relative error of o, lse and gradients of every kernel, head dim and kind of call against float64; what was refused."""
    device, dtype = torch.device(scale.device), torch.float32 if scale.device == "cpu" else torch.bfloat16
    worst: dict[str, float] = {}
    refused: dict[str, str] = {}
    failed: dict[str, str] = {}
    for dim in (16,) if scale.tiny else (64, 128, 256):
        for call, window in _calls(scale):
            spec, rows, keys = AttentionSpec(8, 2, dim, dim**-0.5, window=window), call.q_stop, call.k_stop
            case = AttentionCase(str(dtype).removeprefix("torch."), dim, 8, rows, windows=window is not None)
            inputs = _inputs(rows, keys, (8, 2), dim, device, dtype)
            for name, kernel in kernels_for(device, case):
                where = f"{name}, dim {dim}, {_in_words(call)}, window {window}"
                if isinstance(kernel, str):
                    refused[where] = kernel
                    continue
                try:
                    worst[where] = _error(kernel, inputs, call, spec)
                except FAILURES as error:
                    failed[where] = f"{type(error).__name__}: {error}"[:300]
    return {"worst": worst, "refused": refused, "failed": failed, "ok": not failed and max(worst.values(), default=1.0) < TOLERANCE}


def _calls(scale: Scale) -> Iterator[tuple[Block | Documents, int | None]]:
    """Every kind of call with its window; a tenth of the rows where `scale` is tiny."""
    part = scale.pick(1, 10)
    for rows, keys, causal, window in SHAPES:
        shape, seen = (max(1, rows // part), max(1, keys // part)), window // part if window else None
        yield Block(0, shape[0], 0, shape[1], 0 if causal else shape[1], causal, seen is not None), seen
    cuts = (0, *accumulate(max(1, length // part) for length in LENGTHS))
    for window in WINDOWS:
        yield Documents(0, 0, cuts, window is not None), window // part if window else None


def _in_words(call: Block | Documents) -> str:
    if isinstance(call, Documents):
        return f"{call.count} documents of {call.q_stop}"
    return f"{call.q_stop}x{call.k_stop}, causal {call.causal}"


def _error(kernel: BlockKernel, inputs: QKVD, block: Block | Documents, spec: AttentionSpec) -> float:
    """The largest error relative to the norm of o, lse, dq, dk and dv."""
    ours, exact = _both_ways(kernel, inputs, block, spec), _both_ways(MaskedKernel(), _wide(inputs), block, spec)
    pairs = [(a.double(), b.double()) for a, b in zip(ours, exact, strict=True)]
    seen = [(a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)) for a, b in pairs]
    alike = all(torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs)
    return max(float((a - b).norm() / max(float(b.norm()), 1e-2)) for a, b in seen) if alike else float("inf")


def _wide(inputs: QKVD) -> QKVD:
    q, k, v, do = (t.double() for t in inputs)
    return q, k, v, do


def _both_ways(kernel: BlockKernel, inputs: QKVD, block: Block | Documents, spec: AttentionSpec) -> tuple[Tensor, ...]:
    q, k, v, do = inputs
    if isinstance(block, Documents):
        o, lse = kernel.forward_documents(q, k, v, block, spec)
        return o, lse, *kernel.backward_documents(do, q, k, v, o, lse, block, spec)
    o, lse = kernel.forward(q, k, v, block, spec)
    return o, lse, *kernel.backward(do, q, k, v, o, lse, block, spec)


def int32(scale: Scale) -> Row:
    """A backward block with rows x heads x dim beyond 2^31: equal rows at both ends have equal gradients (FlashAttention 2.7 fails)."""
    device, part = torch.device(scale.device), scale.pick(4096, 8)
    repeats, dtype = scale.pick((1 << 19) // 4096 + 1, 3), torch.float32 if scale.device == "cpu" else torch.bfloat16
    # torch's own, of whose copy it is not known.
    kernel, spec = block_kernel(device, KernelChoice("sdpa", "")), AttentionSpec(32, 8, 128, 128**-0.5)
    q, k, v, _ = _inputs(part, 128, (32, 8), 128, device, dtype)
    q = q.repeat(repeats, 1, 1)
    block = Block(0, len(q), 0, 128, 128, False, False)
    o, lse = kernel.forward(q, k, v, block, spec)
    dq = kernel.backward(q, q, k, v, o, lse, block, spec)[0]
    off = float((dq[:part] - dq[-part:]).abs().max())
    return {"kernel": type(kernel).__name__, "numbers": q.numel(), "beyond_int32": q.numel() > 1 << 31, "worst": off, "ok": off == 0.0}


def speed(scale: Scale) -> Row:
    """TFLOP/s of causal attention by kernel: forward, and backward as 2.5 times the forward's work."""
    device, dtype = torch.device(scale.device), torch.float32 if scale.device == "cpu" else torch.bfloat16
    figures: Row = {}
    missing: dict[str, str] = {}
    for rows, heads in ((scale.pick(65536, 64), (4, 1)), (scale.pick(32768, 64), (32, 8))):
        spec, block = AttentionSpec(*heads, 128, 128**-0.5), Block(0, rows, 0, rows, 0, True, False)
        q, k, v, do = _inputs(rows, rows, heads, 128, device, dtype)
        flops = 2.0 * rows * rows * 128 * heads[0]
        for name, kernel in kernels_for(device, AttentionCase(str(dtype).removeprefix("torch."), 128, heads[0], rows)):
            where = f"{name} {rows}x{heads[0]}"
            if isinstance(kernel, str):
                missing[where] = kernel
                continue
            try:
                o, lse = kernel.forward(q, k, v, block, spec)
                ahead = _seconds(partial(kernel.forward, q, k, v, block, spec), device)
                back = _seconds(partial(kernel.backward, do, q, k, v, o, lse, block, spec), device)
            except FAILURES as error:
                missing[where] = f"{type(error).__name__}: {error}"[:300]
            else:
                figures[where] = {"forward": flops / ahead / 1e12, "backward": 2.5 * flops / back / 1e12}
    return {"tflops": figures, "missing": missing}


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of one call, after one that warms up."""
    work()
    _wait(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait(device)
    return (time.perf_counter() - begun) / repeats


def packs(scale: Scale) -> Row:
    """Seconds of attention over packs of 1, 128 and 1,024 documents: until the host has asked for all of it, and until it is done."""
    device, total = torch.device(scale.device), scale.pick(1 << 20, 128)
    dtype, kernel = torch.float32 if scale.device == "cpu" else torch.bfloat16, block_kernel(device)
    spec, found = AttentionSpec(4, 1, 128, 128**-0.5), {}
    for count in (1, 4, 16) if scale.tiny else (1, 128, 1024):
        # One document is as long as an eighth of a pack: the whole would take longer than all others.
        length = total // count if count > 1 else total // 8
        layout = group_layout((length,) * count, ulysses=1, ring=1)
        blocks = join_documents(attention_blocks(layout.ring_slices[0], layout.ring_slices[0]), pads=kernel.pads)
        both = partial(_all_blocks, _inputs(length * count, length * count, (4, 1), 128, device, dtype), blocks, spec, kernel)
        both()
        _wait(device)
        begun = time.perf_counter()
        both()
        asked_s = time.perf_counter() - begun
        _wait(device)
        found[f"{count} x {length}"] = {"host_s": asked_s, "total_s": time.perf_counter() - begun, "blocks": len(blocks)}
    return {"packs": found}


def _all_blocks(inputs: QKVD, blocks: Calls, spec: AttentionSpec, kernel: BlockKernel) -> None:
    q, k, v, do = inputs
    o, lse = attention_forward(q, k, v, blocks, spec, kernel)
    attention_backward(do, q, k, v, o, lse, blocks, spec, kernel)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

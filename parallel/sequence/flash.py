"""Flash attention on CUDA: torch's own operators, which FlashAttention 3 and 4 can stand behind, cuDNN's, and the flash-attn package.

All take half precision and align masks bottom-right: query i of T sees key j of S where i + S - T - left <= j <= i + S - T under a causal
mask, and every later key without one. What cannot be done so was refused when the kernel was chosen (kernel_choice.py), but for float32
and float64, whose masked path that choice names.

Legend: T query rows, S key rows, H query heads, D head dim. One block is (1, T, H, D) with lse (1, H, T); joined documents are (T, H, D)
with lse (H, T) and the cuts between them as int32. Not yet run on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from .attention import AttentionSpec, MaskedKernel, accumulation_dtype
from .blocks import Block, Documents
from .head_parts import ROWS_OF_TILE, head_parts, heads_of_call
from .kernel_choice import KEY

HALF = (torch.bfloat16, torch.float16)
CUDNN_LEAST_ROWS = 64
"""cuDNN refuses some blocks of very few rows or keys; they cost nothing in torch's kernel."""

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of a library is about, beside its tensors."""

    causal: bool
    left: int | None
    """Keys a query sees to its left, counted from the diagonal that ends in the last row and key; None: all."""
    longest_q: int
    longest_k: int
    cuts: Tensor | None = None
    """(documents + 1,) int32 on the device; None: one block."""

    @property
    def count(self) -> int:
        """Documents of the call."""
        return 1 if self.cuts is None else len(self.cuts) - 1

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) as flash-attn counts them; -1: no bound."""
        return (-1, -1) if self.left is None else (self.left, 0 if self.causal else -1)


def call_of(block: Block, spec: AttentionSpec) -> Call:
    """The call of one block; a block across the window's edge says how far its queries see."""
    rows, keys = block.q_stop - block.q_start, block.k_stop - block.k_start
    left = None
    if block.windowed and spec.window is not None:
        # Query i sees keys from i + offset - window + 1 on. Blocks have no query that sees none of the keys, so this is not negative.
        left = keys - rows - block.offset + spec.window - 1
    return Call(block.causal, left, rows, keys)


def call_of_documents(documents: Documents, spec: AttentionSpec, device: torch.device) -> Call:
    """The call of joined documents, whose cuts go to the device once for all layers."""
    if device not in documents.on_device:
        cuts = torch.tensor(documents.cuts, dtype=torch.int32)
        # From pinned memory nothing waits for the copy.
        documents.on_device[device] = cuts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cuts
    left = spec.window - 1 if documents.windowed and spec.window is not None else None
    return Call(True, left, documents.longest, documents.longest, documents.on_device[device])


class FlashKernel(ABC):
    """What the libraries share: shapes, and calls cut by heads where a library counts in int32.

    `dtypes`: what goes to the library; others go to the masked path. `int32`: the library's backward counts rows x heads x dim in int32.
    """

    pads = ROWS_OF_TILE
    has_softcap = False

    def __init__(self, *, int32: bool = False, dtypes: tuple[torch.dtype, ...] = HALF) -> None:
        self.int32, self._dtypes, self._masked = int32, dtypes, MaskedKernel()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Implements `BlockKernel.forward`."""
        if q.dtype not in self._dtypes:
            return self._masked.forward(q, k, v, block, spec)
        self._check(spec)
        out, lse = self._forward(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), call_of(block, spec), spec)
        return out.squeeze(0), lse.squeeze(0).T

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> Grads:
        """Implements `BlockKernel.backward`."""
        if q.dtype not in self._dtypes:
            return self._masked.backward(do, q, k, v, o, lse, block, spec)
        rows = [t.unsqueeze(0) for t in (do, q, k, v, o, lse.T)]
        dq, dk, dv = self._by_heads(rows, call_of(block, spec), spec)
        return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)

    def forward_documents(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Implements `BlockKernel.forward_documents`."""
        if q.dtype not in self._dtypes:
            return self._masked.forward_documents(q, k, v, documents, spec)
        self._check(spec)
        out, lse = self._forward(q, k, v, call_of_documents(documents, spec, q.device), spec)
        return out, lse.T

    def backward_documents(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, documents: Documents, spec: AttentionSpec
    ) -> Grads:
        """Implements `BlockKernel.backward_documents`."""
        if q.dtype not in self._dtypes:
            return self._masked.backward_documents(do, q, k, v, o, lse, documents, spec)
        return self._by_heads([do, q, k, v, o, lse.T], call_of_documents(documents, spec, q.device), spec)

    def _check(self, spec: AttentionSpec) -> None:
        """ConfigError where scores have a softcap that the library would drop without a word. A choice by the case has refused it."""
        if spec.softcap and not self.has_softcap:
            found = f"a softcap of {spec.softcap:g} in {type(self).__name__}, which has none"
            raise ConfigError(KEY, found=found, expected="a kernel that has one", hint=f"{KEY}=fa2, or train.dtype=float32")

    def _by_heads(self, rows: list[Tensor], call: Call, spec: AttentionSpec) -> Grads:
        """Backward of `rows` (do, q, k, v, o, and lse by heads), a few heads after the other where all are too many for int32.

        Heads, for queries in several calls would need sums of all gradients in float32.
        """
        do, q, k, v, o, lse = rows
        heads, kv_heads = q.shape[-2], k.shape[-2]
        most = heads_of_call(call.longest_q, call.count, q.shape[-1]) if self.int32 else heads
        if most >= heads:
            return self._backward(do.contiguous(), q, k, v, o, lse.contiguous(), call, spec)
        shared = most < heads // kv_heads
        dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(t, dtype=accumulation_dtype(t.dtype) if shared else t.dtype) for t in (k, v))
        for queries, keys in head_parts(heads, kv_heads, most):
            part = [t[..., queries, :] for t in (do, q, o, lse)]
            a, b, c = self._backward(
                part[0].contiguous(), part[1], k[..., keys, :], v[..., keys, :], part[2], part[3].contiguous(), call, spec
            )
            dq[..., queries, :] = a
            dk[..., keys, :] += b
            dv[..., keys, :] += c
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    @abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, spec: AttentionSpec) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: Call, spec: AttentionSpec) -> Grads: ...


class TorchFlashKernel(FlashKernel):
    """torch's flash operators: its own FlashAttention 2, or what torch.nn.attention's registry has put in its place."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        left, right = (None if bound < 0 else bound for bound in call.window)
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, call.cuts, call.cuts, call.longest_q, call.longest_k, 0.0, call.causal, False,
            scale=spec.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out[0], out[1]

    def _backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: Call, spec: AttentionSpec) -> Grads:
        left, right = (None if bound < 0 else bound for bound in call.window)
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's, of which there is none
        empty = torch.empty(0, device=q.device)
        grads: Grads = torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, lse, call.cuts, call.cuts, call.longest_q, call.longest_k, 0.0, call.causal, state, empty,
            scale=spec.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return grads


class CudnnKernel(TorchFlashKernel):
    """cuDNN's operator for blocks; joined documents, windows and blocks of a few rows go to torch's flash operators."""

    @staticmethod
    def _takes(call: Call) -> bool:
        return call.cuts is None and call.left is None and min(call.longest_q, call.longest_k) >= CUDNN_LEAST_ROWS

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        if not self._takes(call):
            return super()._forward(q, k, v, call, spec)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention
        out = operator(q, k, v, None, True, 0.0, call.causal, False, scale=spec.scale)
        return out[0].transpose(1, 2), out[1].reshape(q.shape[:3])

    def _backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: Call, spec: AttentionSpec) -> Grads:
        if not self._takes(call):
            return super()._backward(do, q, k, v, o, lse, call, spec)
        rows = [t.transpose(1, 2) for t in (do, q, k, v, o)]
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))  # dropout's, of which there is none
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *rows, lse.unsqueeze(-1), seed, offset, None, None, None, call.longest_q, call.longest_k, 0.0, call.causal, scale=spec.scale
        )
        return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


class FlashAttnKernel(FlashKernel):
    """The flash-attn package (2.7 or newer), which also has softcap. Its functions take the same places since 2.7."""

    has_softcap = True

    def __init__(self, *, int32: bool = False, dtypes: tuple[torch.dtype, ...] = HALF, deterministic: bool = False) -> None:
        super().__init__(int32=int32, dtypes=dtypes)
        self._deterministic = deterministic

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_varlen_forward

        options = 0.0, spec.scale, call.causal, *call.window, spec.softcap or 0.0, None, False
        if call.cuts is None:
            out, lse, _, _ = _flash_attn_forward(q, k, v, *options)
        else:
            out, lse, _, _ = _flash_attn_varlen_forward(q, k, v, call.cuts, call.cuts, call.longest_q, call.longest_k, *options)
        return out, lse

    def _backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: Call, spec: AttentionSpec) -> Grads:
        from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward

        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        options = 0.0, spec.scale, call.causal, *call.window, spec.softcap or 0.0, None, self._deterministic
        if call.cuts is None:
            _flash_attn_backward(do, q, k, v, o, lse, *grads, *options)
        else:
            cuts = call.cuts, call.cuts, call.longest_q, call.longest_k
            _flash_attn_varlen_backward(do, q, k, v, o, lse, *grads, *cuts, *options)
        return grads

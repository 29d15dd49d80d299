"""Flash attention on CUDA, block by block: the flash-attn package, or torch's own operators. Not yet run on a GPU.

Both take half precision and align causal masks bottom-right, which for the square blocks of blocks.py is the diagonal. Blocks
they cannot do exactly (float32 or float64, head dims they lack, a window edge through an off-diagonal block, a softcap
in torch's operators) go to the masked path. Tensors here are (1, T, H, D); lse comes as (1, H, T).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .attention import AttentionSpec, MaskedKernel
from .blocks import Block


class _Flash(ABC):
    """What both libraries share: when they apply, and shapes."""

    has_softcap: bool

    def __init__(self) -> None:
        self._masked = MaskedKernel()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        if not self._applies(q, block, spec):
            return self._masked.forward(q, k, v, block, spec)
        out, lse = self._forward(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), block, spec)
        return out.squeeze(0), lse.squeeze(0).T

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._applies(q, block, spec):
            return self._masked.backward(do, q, k, v, o, lse, block, spec)
        rows = (do.unsqueeze(0), q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), o.unsqueeze(0))
        dq, dk, dv = self._backward(*rows, lse.T.contiguous().unsqueeze(0), block, spec)
        return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)

    def _applies(self, q: Tensor, block: Block, spec: AttentionSpec) -> bool:
        half = q.dtype in (torch.bfloat16, torch.float16)
        fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        return half and fits and (block.causal or not block.windowed) and (spec.softcap is None or self.has_softcap)

    @staticmethod
    def _left(block: Block, spec: AttentionSpec) -> int | None:
        """Keys a query sees to its left, itself not counted, where the window's edge crosses the block."""
        return spec.window - 1 if block.windowed and spec.window is not None else None

    @abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class TorchFlashKernel(_Flash):
    """torch's built-in FlashAttention-2."""

    has_softcap = False

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        left = self._left(block, spec)
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, block.causal, False,
            scale=spec.scale, window_size_left=left, window_size_right=None if left is None else 0,
        )  # fmt: skip
        return out[0], out[1]

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        left = self._left(block, spec)
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's, of which there is none
        empty = torch.empty(0, device=q.device)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            do.contiguous(), q, k, v, o, lse, None, None, q.shape[1], k.shape[1], 0.0, block.causal, state, empty,
            scale=spec.scale, window_size_left=left, window_size_right=None if left is None else 0,
        )  # fmt: skip
        return grads


class FlashAttnKernel(_Flash):
    """The flash-attn package (2.7 or newer), which also has softcap."""

    has_softcap = True

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        left = self._left(block, spec)
        window = (-1, -1) if left is None else (left, 0)
        out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, spec.scale, block.causal, *window, spec.softcap or 0.0, None, False)
        return out, lse

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        left = self._left(block, spec)
        window = (-1, -1) if left is None else (left, 0)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_backward(
            do.contiguous(), q, k, v, o, lse, dq, dk, dv, 0.0, spec.scale, block.causal, *window, spec.softcap or 0.0, None, False
        )
        return dq, dk, dv

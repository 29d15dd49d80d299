"""Which kernel runs attention blocks on a device."""

from __future__ import annotations

import importlib.util

import torch

from .attention import BlockKernel, CpuKernel


def block_kernel(device: torch.device) -> BlockKernel:
    """CPU: torch's CPU flash operator. CUDA: the flash-attn package where installed, else torch's own flash operators."""
    if device.type == "cpu":
        return CpuKernel()
    from .flash import FlashAttnKernel, TorchFlashKernel

    return FlashAttnKernel() if importlib.util.find_spec("flash_attn") is not None else TorchFlashKernel()

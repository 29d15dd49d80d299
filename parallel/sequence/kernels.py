"""The attention kernel of a device: chosen by kernel_choice.py, put in place here."""

from __future__ import annotations

import torch
from torch.nn import attention as torch_attention

from ..config import AttentionKernel
from .attention import BlockKernel, CpuKernel
from .installed_kernels import installed_versions
from .kernel_choice import AttentionCase, Installed, KernelChoice, choose_kernel

_REGISTRY = {"fa4": "FA4", "fa3": "FA3"}
"""Names of torch.nn.attention's registry."""


def installed_on(device: torch.device) -> Installed | None:
    """What this process has for `device`; None: the CPU."""
    if device.type == "cpu":
        return None
    return Installed(installed_versions(), torch.cuda.get_device_capability(device))


def block_kernel(device: torch.device, choice: KernelChoice | None = None) -> BlockKernel:
    """The kernel of `choice` (None: what `auto` takes for bfloat16 heads of 128) on `device`; torch's registry is switched to it."""
    if choice is None:
        case = AttentionCase(dtype="bfloat16", head_dim=128, num_heads=1, rows=1)
        choice = choose_kernel(AttentionKernel.AUTO, case, installed_on(device))
    if device.type == "cpu":
        return CpuKernel()
    from .flash import CudnnKernel, FlashAttnKernel, TorchFlashKernel

    if choice.kernel in _REGISTRY:
        torch_attention.activate_flash_attention_impl(_REGISTRY[choice.kernel])
    if choice.kernel == "fa2":
        return FlashAttnKernel(int32=choice.counts_in_int32)
    kind = CudnnKernel if choice.kernel == "cudnn" else TorchFlashKernel
    return kind(int32=choice.counts_in_int32)

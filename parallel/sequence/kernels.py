"""The attention kernel of a device: chosen by kernel_choice.py, put in place here."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch.nn import attention as torch_attention

from ...errors import ConfigError
from ..config import AttentionKernel
from .attention import BlockKernel, CpuKernel
from .installed_kernels import installed_versions
from .kernel_choice import KEY, AttentionCase, Installed, KernelChoice, choose_kernel

log = logging.getLogger(__name__)

_REGISTRY = {"fa4": "FA4", "fa3": "FA3"}
"""Names of torch.nn.attention's registry."""


def installed_on(device: torch.device) -> Installed | None:
    """What this process has for `device`; None: the CPU."""
    if device.type == "cpu":
        return None
    return Installed(installed_versions(), torch.cuda.get_device_capability(device))


def kernel_for(asked: AttentionKernel, case: AttentionCase, device: torch.device) -> tuple[BlockKernel, KernelChoice]:
    """The kernel for `case` on `device`, in its place; with `auto` the next one where one cannot be put there, which the log says.

    ConfigError where what was asked for, or anything, cannot.
    """
    installed = installed_on(device)
    while True:
        choice = choose_kernel(asked, case, installed)
        try:
            return block_kernel(device, choice), choice
        except ConfigError as error:
            if asked is not AttentionKernel.AUTO or installed is None:
                raise
            log.warning("attention kernel %s is passed over: %s", choice.kernel, error.found)
            installed = replace(installed, versions={name: row for name, row in installed.versions.items() if name != choice.kernel})


def block_kernel(device: torch.device, choice: KernelChoice | None = None) -> BlockKernel:
    """The kernel of `choice` (None: what `auto` takes for bfloat16 heads of 128) on `device`; torch's registry is switched to it.

    The registry is the process's: kernels made before that are not of the flash-attn package change with it. torch's operators are
    deterministic where the process is (training/deterministic.py). ConfigError where it fails.
    """
    if choice is None:
        case = AttentionCase(dtype="bfloat16", head_dim=128, num_heads=1, rows=1)
        choice = choose_kernel(AttentionKernel.AUTO, case, installed_on(device))
    if device.type == "cpu":
        return CpuKernel()
    from .flash import CudnnKernel, FlashAttnKernel, TorchFlashKernel

    if choice.kernel in _REGISTRY:
        _activate(choice)
    elif choice.kernel != "fa2":
        _restore()
    if choice.kernel == "fa2":
        return FlashAttnKernel(int32=choice.counts_in_int32, deterministic=choice.deterministic)
    kind = CudnnKernel if choice.kernel == "cudnn" else TorchFlashKernel
    return kind(int32=choice.counts_in_int32)


def _activate(choice: KernelChoice) -> None:
    """Put a package behind torch's operators. ConfigError where it is none that this torch can use."""
    try:
        torch_attention.activate_flash_attention_impl(_REGISTRY[choice.kernel])
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise ConfigError(
            KEY,
            found=f"{choice.kernel} {choice.version}, which torch cannot use: {error}",
            expected="a package that imports here, with the functions this torch calls",
            hint=f"{KEY}=fa2, or {KEY}=auto, which goes on to the next kernel",
        ) from error


def _restore() -> None:
    """Put torch's own FlashAttention 2 back, where a kernel that was chosen before took its place."""
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()

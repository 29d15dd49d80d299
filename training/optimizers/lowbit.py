"""AdamW with moments of less precision, by torchao: inexact; 4 bytes a parameter less with bfloat16, 6 less with 8bit.

The update is computed in float32 from the dequantised moments and stored back: torchao's `_AdamBase`, whose subclasses say
what a state tensor is. Blocks of 256 numbers share a scale (Dettmers et al., 8-bit Optimizers via Block-wise Quantization,
ICLR 2022); local tensors below 4,096 numbers or not of whole blocks keep float32. Checkpoints hold the moments in float32, so
a run may go on with any other `optim.state_dtype`, on any number of ranks; 8-bit moments are then rounded once more.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...parallel.sharding.parts import like, memory_of
from .config import OptimConfig, StateDtype

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_lowbit(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """torchao's AdamW over `groups` with moments of `config.state_dtype`; ConfigError where torchao is not installed."""
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.adam import _AdamBase
    except ImportError as error:
        raise ConfigError(
            "optim.state_dtype",
            found=f"{config.state_dtype.value} without torchao ({error})",
            expected="the package whose optimizers have such states",
            hint="pip install 'efflaunch[lowbit]', or optim.state_dtype=float32",
        ) from error
    zeros = AdamW8bit._subclass_zeros if config.state_dtype is StateDtype.INT8 else _bfloat16_zeros
    kind: Any = type("LowBitAdamW", (PortableMoments, _AdamBase), {"_subclass_zeros": staticmethod(zeros)})
    built: torch.optim.Optimizer = kind(
        groups,
        config.lr,
        (config.betas[0], config.betas[1]),
        config.eps,
        config.weight_decay,
        False,
        block_size=256,
        bf16_stochastic_round=False,
        is_adamw=True,
    )
    return built


def _bfloat16_zeros(parameter: Tensor, signed: bool, block_size: int) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.bfloat16)


class PortableMoments:
    """Lets torchao's optimizers take and give moments in float32, as checkpoints hold them; eager on CPU."""

    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Tensor]]
    _new_buffer: Any

    def step(self, closure: None = None) -> None:
        """Update what has a gradient. Compiled on CUDA; eager on CPU, which needs no compiler and no minute to compile."""
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in updated:
            state = self.state.get(parameter)
            for key in MOMENTS if state else ():
                assert state is not None
                state[key] = self._narrowed(parameter, key, state[key])
        on_cpu = all(parameter.device.type == "cpu" for parameter in updated)
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            super().step()  # type: ignore[misc]

    @torch.no_grad()
    def _narrowed(self, parameter: Tensor, key: str, value: Tensor) -> Tensor:
        """A float32 moment as this optimizer would have made it; any other as it is."""
        if not _is_wide(value):
            return value
        narrow: Tensor = self._new_buffer(parameter, key == "exp_avg")
        if _is_wide(narrow):
            return value
        memory_of(narrow).copy_(memory_of(value))
        return narrow

    def plain_state(self, value: Tensor) -> Tensor:
        """A state as a plain float32 tensor of the same sharding: what a checkpoint holds. The tensor itself where it is one."""
        part = memory_of(value)
        wide = part.dequantize() if hasattr(part, "codes") else part.float()
        if wide is part:
            return value
        return like(value, wide)


def _is_wide(value: Tensor) -> bool:
    part = memory_of(value)
    return not hasattr(part, "codes") and part.dtype == torch.float32

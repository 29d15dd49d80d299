"""AdamW with moments of less precision, by torchao: inexact, 2 to 6 bytes a parameter less.

The update is computed in float32 from the dequantised moments and stored back: torchao's `_AdamBase`, whose subclasses say
what a state tensor is. Blocks of 256 numbers share a scale (Dettmers et al., 8-bit Optimizers via Block-wise Quantization,
ICLR 2022); tensors below 4,096 numbers or not of whole blocks keep float32. Checkpoints hold the moments in float32, so a run
may go on with any other `optim.state_dtype`, on any number of ranks.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import ConfigError
from ..config import OptimConfig, StateDtype

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
    eight_bit = config.state_dtype is StateDtype.INT8

    class LowBitAdamW(_AdamBase):
        """torchao's, which also takes moments in float32 (from a checkpoint) and gives them so."""

        @staticmethod
        def _subclass_zeros(parameter: Tensor, signed: bool, block_size: int) -> Tensor:
            if eight_bit:
                return AdamW8bit._subclass_zeros(parameter, signed, block_size)
            return torch.zeros_like(parameter, dtype=torch.bfloat16)

        def step(self, closure: None = None) -> None:
            """Update what has a gradient. Compiled on CUDA; on CPU eager, which needs no compiler and no minute to compile."""
            self._narrow()
            on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
            with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
                super().step()

        def _narrow(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state.get(parameter)
                    for key in MOMENTS if state and parameter.grad is not None else ():
                        state[key] = self._narrowed(parameter, key, state[key])

        @torch.no_grad()
        def _narrowed(self, parameter: Tensor, key: str, value: Tensor) -> Tensor:
            if type(_local(value)) is not Tensor or _local(value).dtype != torch.float32:
                return value
            narrow = self._new_buffer(parameter, key == "exp_avg")
            if type(_local(narrow)) is Tensor and _local(narrow).dtype == torch.float32:
                return value
            _local(narrow).copy_(_local(value))
            return narrow

        def plain_state(self, value: Tensor) -> Tensor:
            """A state as a plain float32 tensor of the same sharding: what a checkpoint holds."""
            part = _local(value)
            wide = part.dequantize() if hasattr(part, "codes") else part.float()
            return DTensor(wide, value._spec, requires_grad=False) if isinstance(value, DTensor) else wide  # type: ignore[call-arg]

    return LowBitAdamW(
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


def _local(value: Tensor) -> Tensor:
    # Not to_local(), which wraps the part once more and loses its class.
    return value._local_tensor if isinstance(value, DTensor) else value

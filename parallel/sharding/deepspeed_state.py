"""Finds this rank's part of ZeRO's float32 weights and optimizer states by the model's own names, as views of its flat buffers."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...checkpoint import state
from ...checkpoint.flat import Flat, Piece
from ...checkpoint.reader import SavedTensor
from . import parts
from .deepspeed import Zero


@dataclass(frozen=True, slots=True)
class Place:
    """Where this rank's run of a parameter's numbers lies."""

    shape: tuple[int, ...]
    buffer: Tensor
    """ZeRO's flat float32 weights of several parameters; states are kept for all of it."""
    first: int
    """Number of `buffer` that the run starts with."""
    count: int
    begin: int
    """Number of the parameter that the run starts with."""

    def of(self, flat: Tensor) -> Flat:
        """The run in a buffer that is laid out as `buffer` is."""
        return Flat(self.shape, flat.detach().narrow(0, self.first, self.count), self.begin)


def places(zero: Zero) -> dict[str, Place]:
    """The place of every parameter's run, by name; runs may be empty."""
    find = _place_of_whole if zero.stage < 3 else _place_of_partition
    return {name: find(zero.engine.optimizer, parameter) for name, parameter in zero.model.named_parameters()}


def _is_bf16_optimizer(optimizer: Any) -> bool:
    """Whether it is what DeepSpeed takes for stage 1 in bfloat16: BF16_Optimizer, with names of its own and whole gradients."""
    return hasattr(optimizer, "bf16_groups")


def _place_of_whole(optimizer: Any, parameter: Any) -> Place:
    """Stages 1 and 2: a flat buffer of each group of parameters, cut evenly over ranks."""
    shape, mapping = tuple(parameter.shape), parameter._hp_mapping
    bf16 = _is_bf16_optimizer(optimizer)
    groups = optimizer.bf16_groups if bf16 else optimizer.bit16_groups
    group = next(index for index, group in enumerate(groups) if any(each is parameter for each in group))
    buffer = (optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups)[group]
    if mapping is None:
        return Place(shape, buffer, 0, 0, 0)
    inside = mapping.hp_fragment_address
    return Place(shape, buffer, inside.start, inside.numel, mapping.lp_fragment_address.start)


def _place_of_partition(optimizer: Any, parameter: Any) -> Place:
    """Stage 3: each parameter is cut evenly over ranks by itself, its last part padded."""
    group, first, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
    begin = min(part * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    count = min(part, parameter.ds_numel - begin)
    return Place(tuple(parameter.ds_shape), optimizer.fp32_partitioned_groups_flat[group], first, count, begin)


class FlatWeights(nn.Module):
    """Holds this rank's runs of the float32 weights by the model's names and ties, and the model's own buffers; has no forward."""


def flat_weights(model: nn.Module, found: dict[str, Place]) -> FlatWeights:
    """The float32 weights as `Flat` tensors."""
    root = FlatWeights()
    made = {parameter: found[name].of(found[name].buffer) for name, parameter in model.named_parameters()}
    _fill(root, model, made)
    return root


def _fill(shell: nn.Module, module: nn.Module, made: dict[nn.Parameter, Flat]) -> None:
    for name, parameter in module._parameters.items():
        # Not registered: a run takes part in no graph, which an nn.Parameter would say of it.
        shell._parameters[name] = None if parameter is None else made[parameter]  # type: ignore[assignment]
    for name, buffer in module._buffers.items():
        shell.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        inner = None if child is None else nn.Module()
        shell.add_module(name, inner)
        if child is not None and inner is not None:
            _fill(inner, child, made)


def weights_changed(zero: Zero) -> None:
    """Give the model the float32 weights, which were written from outside. Collective."""
    optimizer = zero.engine.optimizer
    if zero.stage < 3:
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)


def gradient_norm(zero: Zero) -> float:
    """The global norm of a step's gradients, before its update; NaN where it is not finite. Collective."""
    from deepspeed.runtime.utils import get_global_norm_of_tensors
    from deepspeed.runtime.zero import stage3

    optimizer = zero.engine.optimizer
    if zero.stage == 3:
        norm = stage3.combine_grad_norm_groups(optimizer._get_norm_groups())
    elif _is_bf16_optimizer(optimizer):
        norm = get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0], mpu=None)
    else:
        norm = optimizer.scaled_global_norm()
    # It has -1 for what is not finite.
    value = float(norm)
    return value if value >= 0.0 and math.isfinite(value) else math.nan


def discard_gradients(zero: Zero) -> None:
    """Drop a step's gradients."""
    zero.engine.optimizer.zero_grad()
    zero.engine.optimizer.averaged_gradients = {}


class ZeroState:
    """The `State` of a model that ZeRO holds: its float32 weights, its buffers, and its optimizer's states."""

    def __init__(self, zero: Zero, weights: FlatWeights, found: dict[str, Place]) -> None:
        self._zero, self._weights, self._places = zero, weights, found

    @property
    def _states(self) -> dict[Tensor, dict[str, Tensor]]:
        states: dict[Tensor, dict[str, Tensor]] = self._zero.engine.optimizer.optimizer.state
        return states

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by checkpoint key."""
        tensors = state.model_tensors(self._weights)
        for name, place in self._places.items():
            for key, value in self._states.get(place.buffer, {}).items():
                # A count of steps is one number for all parameters of a buffer.
                tensors[f"{state.OPTIMIZER}{name}.{key}"] = place.of(value) if value.ndim else value
        return tensors

    def changing_in_forward(self) -> set[str]:
        """Keys of buffers."""
        return state.changing_in_forward(self._zero.model)

    def allocate(self, saved: dict[str, SavedTensor]) -> None:
        """Empty optimizer states as `saved` has them."""
        states = self._states
        states.clear()
        for name, place in self._places.items():
            for key, entry in state.saved_states(saved, name):
                if key not in states[place.buffer]:
                    like = torch.zeros_like(place.buffer, dtype=entry.dtype).detach()
                    is_whole = tuple(entry.size) == place.shape and bool(place.shape)
                    states[place.buffer][key] = like if is_whole else torch.empty(entry.size, dtype=entry.dtype, device=like.device)

    def local(self, value: Tensor, offsets: tuple[int, ...]) -> Tensor:
        """This rank's memory of the box that starts there."""
        return value.at(offsets) if isinstance(value, Flat) else parts.memory_of(value)

    def pieces(self, value: Tensor) -> list[Piece]:
        """All this rank's boxes."""
        return parts.pieces(value)

    def sharding(self, value: Tensor) -> Hashable:
        """How it lies over the ranks."""
        return parts.sharding(value)

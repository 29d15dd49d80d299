"""Makes float32 weights in host memory, with the names and sharding of a model whose own are in compute precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HostWeights(nn.Module):
    """Holds parameters in host memory, sharded like the model's, and the model's own buffers; has no forward.

    Names, their order and ties are the model's, so what it gives to a checkpoint is what the model itself would give
    with its states on the device.
    """


def host_weights(model: nn.Module, dtype: torch.dtype) -> HostWeights:
    """Host parameters of `dtype` for each trained one of the model's (sharded, materialised or on meta), not filled. No communication.

    Frozen parameters are the model's own: nothing updates them.
    """
    made: dict[Tensor, nn.Parameter] = {}
    root = HostWeights()
    _fill(root, model, made, dtype)
    return root


def _fill(shell: nn.Module, module: nn.Module, made: dict[Tensor, nn.Parameter], dtype: torch.dtype) -> None:
    for name, parameter in module._parameters.items():
        if parameter is None:
            shell.register_parameter(name, None)
            continue
        if parameter not in made:
            made[parameter] = _on_host(parameter, dtype) if parameter.requires_grad else parameter
        shell.register_parameter(name, made[parameter])
    for name, buffer in module._buffers.items():
        shell.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        inner = None if child is None else nn.Module()
        shell.add_module(name, inner)
        if child is not None and inner is not None:
            _fill(inner, child, made, dtype)


def _on_host(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    # A sharded tensor keeps its mesh; only this rank's part is on the host.
    return nn.Parameter(torch.empty_like(parameter.detach(), dtype=dtype, device="cpu"))

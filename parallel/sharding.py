"""Parameters, gradients and optimizer states over ranks: FSDP2 per decoder layer, HSDP with replicas, degree 1 alike.

Note: sums, not means. Every rank's loss is already divided by the step's global number of target tokens, so gradients are
summed over all ranks. FSDP2's divide factor is per wrapped module and its pre-multiplied sums do not exist on gloo:
each wrapped module gets factor 1 and plain sum reductions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard_model(
    model: nn.Module,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Shard each layer, then what is left of the model (embedding, last norm, head) as one group.

    Weights keep their dtype; they are gathered in `compute_dtype`, gradients are reduced in `reduce_dtype` (None: the weights').
    """
    stored = next(model.parameters()).dtype
    reduced = reduce_dtype or stored
    precision = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == stored else compute_dtype,
        reduce_dtype=None if compute_dtype == reduced else reduced,
        cast_forward_inputs=False,
    )
    for module in (*layers, model):
        wrapped: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=precision)
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)


def prepare_backward(model: nn.Module, *, reduce: bool, last: bool) -> None:
    """Before a micro-batch: `reduce` its gradients across ranks, or add to whole local ones until a later one does; `last` of the step."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(reduce)
    model.set_is_last_backward(last)


def keep_weights(model: nn.Module, *, keep: bool) -> None:
    """Whether gathered weights stay after each backward pass. They always stay after forward once this was called."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(not keep)


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """One module's weights are whole inside, and sharded again afterwards unless they stay whole in any case. Collective if sharded."""
    if not isinstance(module, FSDPModule):
        yield
        return
    group = module._get_fsdp_state()._fsdp_param_group
    try:
        module.unshard()
        yield
    finally:
        if group is not None and group.reshard_after_backward:
            module.reshard()


def forget_pass(model: nn.Module) -> None:
    """After an exception inside a forward or backward pass: weights are sharded, and gradients gone that no rank has reduced yet.

    The next pass starts as the first one did. Nothing is sent: every rank calls it for itself.
    """
    assert isinstance(model, FSDPModule)
    model.reset_iter_state()
    model.set_reshard_after_backward(True)
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in () if group is None else group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # made by the first gather
                parameter.unsharded_param.grad = None


def gather_weights(model: nn.Module) -> None:
    """Gather every weight now. Collective over the mesh."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()

"""The first engine: FSDP2 per decoder layer, HSDP with replicas, degree 1 alike.

Note: sums, not means. Every rank's loss is already divided by the step's global number of target tokens, so gradients are
summed over all ranks. FSDP2's divide factor is per wrapped module and its pre-multiplied sums do not exist on gloo:
each wrapped module gets factor 1 and plain sum reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ...checkpoint import state
from ...checkpoint.flat import Piece
from ...checkpoint.reader import SavedTensor
from . import parts


def shard_model(
    model: nn.Module,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype | None = None,
    placement: Callable[[nn.Parameter], Any] | None = None,
) -> Fsdp2Weights:
    """Shard each layer, then what is left of the model (embedding, last norm, head) as one group.

    Weights keep their dtype; they are gathered in `compute_dtype`, gradients are reduced in `reduce_dtype` (None: the weights').
    `placement`: of weights that lie on another mesh (experts.py).
    """
    stored = next(model.parameters()).dtype
    reduced = reduce_dtype or stored
    # Frozen weights are stored in compute precision beside trained ones that are not.
    alike = all(parameter.dtype == compute_dtype for parameter in model.parameters())
    precision = MixedPrecisionPolicy(
        param_dtype=None if alike else compute_dtype,
        reduce_dtype=None if compute_dtype == reduced else reduced,
        cast_forward_inputs=False,
    )
    for module in (*layers, model):
        wrapped: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=precision, shard_placement_fn=placement)
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)
    return Fsdp2Weights(model)


class Fsdp2Weights:
    """The `Weights` of a model that `shard_model` sharded."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, FSDPModule)
        self._model: Any = model

    def forward(self, *inputs: Any) -> Tensor:
        """Through the root's hooks, which gather and prefetch."""
        output: Tensor = self._model(*inputs)
        return output

    def prepare(self, *, reduce: bool, last: bool) -> None:
        """Whether the next backward reduces gradients, and whether it is the step's last."""
        self._model.set_requires_gradient_sync(reduce)
        self._model.set_is_last_backward(last)

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Autograd's backward; FSDP2's hooks gather and reduce on the way."""
        output.backward(gradient)  # type: ignore[no-untyped-call]

    def weight_pass(self, layers: Iterable[nn.Module]) -> None:
        """What FSDP2's hooks do behind each layer's backward and behind the model's, for there is no graph that they hang on.

        Note: the trap. torch's own zero bubble leaves the reduction to the hooks of a backward that is of inputs alone, and is silently
        wrong with layers that FSDP2 wraps: weights' gradients come after it. Here that backward reduces nothing of them, and this does.
        """
        for layer in layers:
            for group in reversed(groups_of(layer)) if isinstance(layer, FSDPModule) else ():
                group.post_backward()
        self._model._get_fsdp_state()._root_post_backward_final_callback()

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Whole inside, sharded again afterwards unless weights stay whole in any case."""
        if not isinstance(module, FSDPModule):
            yield
            return
        try:
            module.unshard()
            yield
        finally:
            if any(group.reshard_after_backward for group in groups_of(module)):
                module.reshard()

    def keep_whole(self, *, keep: bool) -> None:
        """Gathered weights stay after each backward pass, or go again. They always stay after forward once this was called."""
        self._model.set_reshard_after_forward(False)
        self._model.set_reshard_after_backward(not keep)
        if keep:
            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()

    def forget(self) -> None:
        """The next pass starts as the first one did; every rank calls it for itself."""
        self._model.reset_iter_state()
        self._model.set_reshard_after_backward(True)
        for module in self._model.modules():
            groups = groups_of(module) if isinstance(module, FSDPModule) else []
            for parameter in (parameter for group in groups for parameter in group.fsdp_params):
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # made by the first gather
                    parameter.unsharded_param.grad = None


def groups_of(module: FSDPModule) -> list[Any]:
    """FSDP2's groups of a module's own parameters: one for each mesh they lie on."""
    groups: list[Any] = module._get_fsdp_state()._fsdp_param_groups
    return groups


def reduces_together(module: nn.Module) -> bool:
    """Whether the gradients of a module's own parameters are reduced at once, apart from those of the module it is in."""
    return isinstance(module, FSDPModule)


def on_reduction(module: nn.Module, hook: Callable[[Tensor], None]) -> None:
    """Call `hook` with the flat sum of a module's gradients, in the precision it was reduced in.

    FSDP2 casts it to the parameters' dtype before hooks of parameters see it; its all-reduce hook runs before that.
    """
    assert isinstance(module, FSDPModule)
    module.set_all_reduce_hook(hook)


class Fsdp2State:
    """The `State` of a model and its optimizer, sharded by FSDP2 or whole; `model` may be host weights of the same names.

    `frozen`: names of parameters that never change, and that checkpoints leave out.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: Collection[str] = ()) -> None:
        self._model, self._optimizer = model, optimizer
        self._left_out = frozenset(state.MODEL + name for name in frozen)

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by checkpoint key."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                # After a forward without backward FSDP2 leaves whole parameters in place of its shards.
                module.reshard()
        weights = {key: value for key, value in state.model_tensors(self._model).items() if key not in self._left_out}
        return weights | state.optimizer_tensors(self._model, self._optimizer)

    def changing_in_forward(self) -> set[str]:
        """Keys of buffers."""
        return state.changing_in_forward(self._model)

    def allocate(self, saved: dict[str, SavedTensor]) -> None:
        """Empty optimizer states as `saved` has them."""
        state.allocate_optimizer(self._model, self._optimizer, saved)

    def local(self, value: Tensor, offsets: tuple[int, ...]) -> Tensor:
        """This rank's own memory, which is one piece."""
        return parts.memory_of(value)

    def pieces(self, value: Tensor) -> list[Piece]:
        """The one piece, and where it starts in the whole."""
        return parts.pieces(value)

    def sharding(self, value: Tensor) -> Hashable:
        """How it lies over the ranks."""
        return parts.sharding(value)

"""The second engine: DeepSpeed's ZeRO (1910.02054), stages 1 to 3, around a model whose layers are ours.

Note: what stage 3 has to be told. Our executor reads a layer's weights without calling the modules they are in: each decoder layer is
a leaf, gathered whole. Last norm and head are read by the loss: they are external parameters of the model itself.
Nothing of DeepSpeed is compiled: the collectives are torch's, and so is AdamW.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import EfflaunchError
from .deepspeed_settings import ZeroSettings, deepspeed_config, gradient_factor

log = logging.getLogger(__name__)
BuildOptimizer = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of parameters by name."""


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a kind of device and join its communication to the process group there is. Nothing of it goes to stdout."""
    os.environ["DS_ACCELERATOR"] = device.type
    # The handler of its logger keeps the stream that it finds here.
    with redirect_stdout(sys.stderr):
        import deepspeed

        # It would compile a shared-memory collective of its own at the first communication (40 s, a compiler, a lock that a killed
        # build leaves behind); without one it takes torch's. What can be compiled is asked of this table, which is made once.
        vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", dist_init_required=False, verbose=False)
    return deepspeed


@dataclass(frozen=True)
class Zero:
    """A model that ZeRO holds."""

    model: nn.Module
    engine: Any
    """DeepSpeed's engine; its `optimizer` is ZeRO's, around the one that was built."""
    stage: int


def shard_by_zero(
    model: nn.Module, layers: Sequence[nn.Module], device: torch.device, settings: ZeroSettings, build_optimizer: BuildOptimizer
) -> Zero:
    """Take a model on the meta device, weights in the precision of computation, and give each rank its part, not filled. Collective.

    With stage 3 no rank has more than one module whole. Every rank of the process group takes part.
    """
    deepspeed, config = load_deepspeed(device), deepspeed_config(settings)
    with redirect_stdout(io.StringIO()) as printed:
        if settings.stage == 3:
            _partition(model, layers, device, deepspeed, config)
        else:
            _materialise(model, [model], device)
        optimizer = build_optimizer(dict(model.named_parameters()))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    # Tables of memory, from one of its optimizers.
    log.debug("DeepSpeed: %s", printed.getvalue())
    return Zero(model, engine, settings.stage)


def _materialise(
    model: nn.Module, modules: Sequence[nn.Module], device: torch.device, then: Callable[[nn.Module], None] | None = None
) -> None:
    """Give modules memory, one after the other, `then` being called for each; tied parameters stay one."""
    ties = _ties(model)
    for module in modules:
        # A tied one may have its memory already.
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            module.to_empty(device=device)
        for name, first in ties.items():
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner).register_parameter(own, model.get_parameter(first))
        if then is not None:
            then(module)


def _ties(model: nn.Module) -> dict[str, str]:
    """Second names of parameters that have several, with the first."""
    firsts = {parameter: name for name, parameter in model.named_parameters()}
    everyone = model.named_parameters(remove_duplicate=False)
    return {name: firsts[parameter] for name, parameter in everyone if firsts[parameter] != name}


def _partition(model: nn.Module, layers: Sequence[nn.Module], device: torch.device, deepspeed: Any, config: dict[str, Any]) -> None:
    """Stage 3's own parameters, module by module."""
    from deepspeed.utils import set_z3_leaf_modules

    dtype = next(model.parameters()).dtype
    inside = {module for layer in layers for module in layer.modules()}
    rest = [module for module in model.modules() if module not in inside and (module._parameters or module._buffers)]

    def shard(module: nn.Module) -> None:
        if any(not hasattr(parameter, "ds_id") for parameter in module.parameters()):
            deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)

    _materialise(model, [*layers, *rest], device, shard)
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    outside: Any = model
    for parameter in (*outside.model.norm.parameters(), outside.lm_head.weight):
        deepspeed.zero.register_external_parameter(model, parameter)


class ZeroWeights:
    """The `Weights` of a model that `shard_by_zero` took."""

    def __init__(self, zero: Zero) -> None:
        self._engine, self._stage = zero.engine, zero.stage
        self.factor = gradient_factor(zero.stage, zero.engine.dp_world_size)
        """What a loss is multiplied by in `backward`; gradients that do not come through the loss have to be."""

    def forward(self, *inputs: Any) -> Tensor:
        """Through the engine's hooks, which gather and prefetch."""
        output: Tensor = self._engine(*inputs)
        return output

    def prepare(self, *, reduce: bool, last: bool) -> None:
        """Whether the next backward is the step's last. When to reduce follows from the stage."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Backward of a loss; the engine's hooks gather and reduce on the way."""
        assert gradient is None, "ZeRO has no stages of a pipeline here"
        self._engine.backward(output * self.factor, scale_wrt_gas=False)

    def weight_pass(self, layers: Iterable[nn.Module]) -> None:
        """AssertionError: refused where stages are configured."""
        raise AssertionError("ZeRO has no stages of a pipeline here")

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Whole inside; with stages 1 and 2 they always are."""
        if self._stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(module.parameters())):
            yield

    def keep_whole(self, *, keep: bool) -> None:
        """AssertionError: refused where it is configured."""
        raise AssertionError("ranks meet in every micro-batch under ZeRO")

    def forget(self) -> None:
        """EfflaunchError: what hooks hold of an aborted pass cannot be given back; a start from the last checkpoint can go on."""
        raise EfflaunchError("engine=deepspeed cannot take back a pass that ended in an exception; efflaunch resume RUN_DIR begins anew")

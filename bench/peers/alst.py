"""DeepSpeed's ALST parts on one process: TiledMLP, TiledFusedLogitsLoss, checkpoint inputs on the host (2506.13996, sec. 3).

All three are the installed package's own code, driven as its docstrings show. Ulysses has nothing to do on one rank. Two
things differ from a GPU run: see `Alst.notes`.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .host import HostMemory
from .shape import Task
from .stock import Contestant, stock_model, token_ids

LOGITS_BYTES = 1 << 30
"""ALST cuts the loss into tiles of about so many bytes of float32 logits, at full width."""


class Alst(Contestant):
    """`as_shipped`: restored checkpoint inputs stay on the device until the step ends, as DeepSpeed 0.19.8's context does it."""

    def __init__(self, task: Task, *, as_shipped: bool = False) -> None:
        self.model, self.host, ids = stock_model(task), HostMemory(), token_ids(task)
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in self.model.model.layers:
            layer.mlp.forward = MethodType(_tiled_mlp, layer.mlp)
        self._ids, self._targets = ids, F.pad(ids[:, 1:], (0, 1), value=-100)
        self._loss_chunk, self._as_shipped = task.chunks.loss, as_shipped
        self._offload = _host_offload(self.host, cache=as_shipped)

    def step(self) -> float:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        num_tokens = self._ids.shape[1]
        with self._offload:
            hidden = self.model.model(input_ids=self._ids, use_cache=False).last_hidden_state
            shards, weights = math.ceil(num_tokens / self._loss_chunk), [self.model.lm_head.weight]
            share = _LossShare(num_tokens - 1)
            loss: Tensor = TiledFusedLogitsLoss.apply(share, self.model.lm_head, hidden, self._targets, None, shards, weights, "sum")
            del hidden
            loss.backward()
        return float(loss.detach())

    def notes(self) -> str:
        shipped = "kept on the device until the step ends, as the package's context does"
        ours = "given up once used, better than the package's context, which keeps them on the device until the step ends"
        return (
            "deepspeed's TiledMLP (tiles of as many tokens as the model is wide, as its docstring has it), TiledFusedLogitsLoss and "
            "CheckpointHiddenStatesOffload. That engine declines to move CPU tensors; the check is overridden, with blocking copies in "
            f"place of CUDA streams. Restored inputs are {shipped if self._as_shipped else ours}"
        )


class _LossShare:
    """A tile's sum of token losses over the number of all targets (the fused loss cannot be scaled afterwards)."""

    def __init__(self, num_targets: int) -> None:
        self._num_targets = num_targets

    def __call__(self, head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, ignore_index=-100, reduction="sum") / self._num_targets


def _tiled_mlp(mlp: Any, x: Tensor) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    shards = math.ceil(x.shape[-2] / x.shape[-1])
    weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
    out: Tensor = TiledMLP.apply(_mlp, mlp, x, shards, weights)
    return out


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return out


def _host_offload(host: HostMemory, *, cache: bool) -> Any:
    """DeepSpeed's context with host buffers from `host`; entered once a step."""
    from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload, _OffloadedTensorRef

    class HostOffload(CheckpointHiddenStatesOffload):  # type: ignore[misc]
        def _should_skip(self, tensor: Tensor) -> bool:
            return self._num_bytes(tensor) < self.min_offload_bytes or isinstance(tensor, torch.nn.Parameter)

        def _empty_cpu_like(self, tensor: Tensor) -> tuple[Tensor, Any]:
            key = self._buffer_key(tensor)
            pool = self._cpu_buffer_pool.get(key)
            if pool:
                self._cpu_buffer_pool_count -= 1
                return pool.pop(), key
            return host.empty_like(tensor), key

        def _unpack_tensor(self, saved: Any) -> Tensor:
            if not cache and isinstance(saved, _OffloadedTensorRef):
                return self._restore_tensor(saved.tensor_id, cache=False)
            return super()._unpack_tensor(saved)

    return HostOffload(use_pin_memory=False, use_streams=False)

"""Groups the parameters whose gradients come together: FSDP2 reduces a wrapped module's at once, last layers first.

Note: FSDP2 calls the post-accumulate-gradient hooks of its sharded parameters right after a reduction, within the stream it
ran on, parameter after parameter of one module (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce).
What a hook enqueues there is ordered after the reduction and before anything that waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...parallel.sharding.fsdp2 import on_reduction, reduces_together
from ...parallel.sharding.parts import local


@dataclass(eq=False)
class Bucket:
    """The trainable parameters of one wrapped module, whose gradients are reduced together."""

    name: str
    """Name of the module; empty for what is left of the model: embedding, last norm and head."""
    index: int
    module: nn.Module
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    wide: Tensor | None = None
    """The reduction's result before it is cast to the parameters' dtype, while hooks run; see `keep_wide`."""
    arrived: set[nn.Parameter] = field(default_factory=set)
    """Parameters whose gradient has come in the present reduction."""

    @property
    def label(self) -> str:
        """Name of the module as messages show it."""
        return self.name or "embedding, last norm and head"

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the reduced gradient, in the precision of the reduction."""
        assert parameter.grad is not None
        narrow = local(parameter.grad)
        if self.wide is None:
            return narrow
        # The gradient is a view of the cast buffer; the same view of the buffer before the cast.
        return self.wide.as_strided(narrow.size(), narrow.stride(), narrow.storage_offset())


def find_buckets(model: nn.Module) -> list[Bucket]:
    """One bucket per wrapped module with trainable parameters, in the model's order; a single one for an unwrapped model."""
    buckets: dict[nn.Module, Bucket] = {}
    seen: set[nn.Parameter] = set()

    def visit(module: nn.Module, name: str, owner: nn.Module, owner_name: str) -> None:
        if reduces_together(module):
            owner, owner_name = module, name
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                bucket = buckets.setdefault(owner, Bucket(owner_name, len(buckets), owner))
                bucket.names.append(f"{name}.{key}" if name else key)
                bucket.parameters.append(parameter)
        for key, child in module.named_children():
            visit(child, f"{name}.{key}" if name else key, owner, owner_name)

    visit(model, "", model, "")
    return list(buckets.values())


def watch(buckets: list[Bucket], on_reduced: Callable[[Bucket], None]) -> None:
    """Call `on_reduced(bucket)` in backward whenever all gradients of a bucket have been reduced; it may take or drop them."""
    for bucket in buckets:
        for parameter in bucket.parameters:
            parameter.register_post_accumulate_grad_hook(_arrival(bucket, on_reduced))


def _arrival(bucket: Bucket, on_reduced: Callable[[Bucket], None]) -> Callable[[Tensor], None]:
    def arrived(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        bucket.arrived.add(parameter)
        if len(bucket.arrived) == len(bucket.parameters):
            bucket.arrived.clear()
            with torch.no_grad():
                on_reduced(bucket)
            bucket.wide = None

    return arrived


def keep_wide(buckets: list[Bucket]) -> None:
    """Keep the reduction's own result for the hooks where weights are stored in less precision than gradients are reduced in."""
    for bucket in buckets:
        on_reduction(bucket.module, _keeper(bucket))


def _keeper(bucket: Bucket) -> Callable[[Tensor], None]:
    def keep(reduced: Tensor) -> None:
        bucket.wide = reduced

    return keep


def check_all_arrived(buckets: list[Bucket]) -> None:
    """Raise AssertionError where some gradients of a module were reduced and others were not: it would never be updated."""
    for bucket in buckets:
        missing = [name for name, parameter in zip(bucket.names, bucket.parameters, strict=True) if parameter not in bucket.arrived]
        assert len(missing) in (0, len(bucket.names)), f"no gradient for {', '.join(missing)}"

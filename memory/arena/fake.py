"""A step of a real model without its memory: fake tensors have sizes and no storage, so any length is traced on a laptop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .trace import Trace
from .tracer import StorageTracer


class _EveryRow(TorchDispatchMode):
    """Operations whose result's size depends on values, which fake tensors lack: `nonzero` of a vector finds every row.

    So every token of a traced step has a target.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and args[0].dim() == 1:
            return args[0].new_empty((args[0].shape[0], 1), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside are fake; a model whose step is traced is built inside."""
    with FakeTensorMode(), _EveryRow():
        yield


def trace_step(step: Callable[[], object], external: Callable[[], list[Tensor]]) -> Trace:
    """Every storage of the second `step`; the first warms up. `external`: what is there before, asked for in between.

    The same for real tensors and inside `fake_tensors`.
    """
    step()
    with StorageTracer(external()) as tracer:
        step()
    return tracer.trace()

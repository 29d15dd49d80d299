"""Memory that stands for the host's on a machine without a GPU, where device and host are the same memory.

What a scheme moves to the host is told to a `HostMemory`; a `DeviceTracer` then counts device bytes alone, and the host's apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from ..tracer import StorageTracer


class HostMemory:
    """Which storages stand for host memory, and how many bytes of them are live now and were at most."""

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A dense host buffer of the tensor's shape; no tracer sees it being made."""
        with _disable_current_modes():
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.adopt(buffer)
        return buffer

    def adopt(self, tensor: Tensor) -> None:
        """From now on the tensor's storage is host memory."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, key).atexit = False

    def holds(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._sizes

    def _gone(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


class DeviceTracer(StorageTracer):
    """A StorageTracer that does not count storages that are the host's."""

    def __init__(self, external: Iterable[Tensor], is_host: Callable[[torch.UntypedStorage], bool]) -> None:
        self._is_host = is_host
        super().__init__(external)

    def _see(self, tensor: Tensor, made_by: str) -> None:
        if not self._is_host(tensor.untyped_storage()):
            super()._see(tensor, made_by)


class SaveOnHost(saved_tensors_hooks):
    """torch's `save_on_cpu` as it behaves on a GPU: a host copy while saved, a device copy when used.

    On CPU tensors torch's own gives the host copy itself back, which would hide the device copy.
    """

    def __init__(self, host: HostMemory) -> None:
        def pack(tensor: Tensor) -> Tensor:
            return host.empty_like(tensor).copy_(tensor)

        def unpack(saved: Tensor) -> Tensor:
            return saved.clone()

        super().__init__(pack, unpack)

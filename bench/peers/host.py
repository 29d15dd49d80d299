"""Memory that stands for the host's on a machine without a GPU, where device and host are the same memory.

What a peer moves to the host lies in buffers of a `HostMemory`, which the tracer leaves out of the device's bytes (as it does
with our own store's arena) and which counts them itself.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes


class HostMemory:
    """Buffers that stand for host memory, and how many bytes of them are live now and were at most."""

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A dense host buffer of the tensor's shape; no tracer sees it being made."""
        with _disable_current_modes():
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        storage = buffer.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, storage.data_ptr()).atexit = False
        return buffer

    def owns(self, address: int) -> bool:
        """Return whether a storage at this address is one of the buffers."""
        return address in self._sizes

    def _gone(self, address: int) -> None:
        self.live_bytes -= self._sizes.pop(address)


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

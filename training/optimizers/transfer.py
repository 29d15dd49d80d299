"""Copies between a device and host buffers without blocking; only users of a copy wait. Plain buffers on CPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ...units import format_bytes

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Pairs (target, source) of copies."""


class Copied:
    """A copy that has begun. `wait` returns when its target can be used by the host and its source can go."""

    def __init__(self, event: torch.cuda.Event | None, pairs: Pairs) -> None:
        # The sources stay alive here: the allocator must not hand them out while they are read.
        self._event, self._pairs = event, pairs

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
        self._pairs = ()


class Link:
    """A device's two directions, each a stream of its own on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._down: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None
        self._up: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None

    def to_host(self, pairs: Pairs) -> Copied:
        """Begin copies to pinned host tensors, after what the current stream was given so far."""
        if self._down is not None:
            self._down.wait_stream(torch.cuda.current_stream(self.device))
        return self._copy(self._down, pairs)

    def to_device(self, pairs: Pairs) -> Copied:
        """Begin copies from pinned host tensors. Who writes a weight has waited for all that reads it: its gradient has come."""
        return self._copy(self._up, pairs)

    def _copy(self, stream: torch.cuda.Stream | None, pairs: Pairs) -> Copied:
        if stream is None:
            for target, source in pairs:
                target.copy_(source)
            return Copied(None, ())
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return Copied(event, pairs)

    def join(self) -> None:
        """Make the current stream, and what waits for it, wait for all copies to the device."""
        if self._up is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._up)

    def host_buffer(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """A host buffer, page-locked on CUDA, exactly as large as asked: torch rounds pinned allocations up to powers of two."""
        buffer = torch.empty(num_elements, dtype=dtype)
        if self.device.type == "cuda" and num_elements:
            status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel() * buffer.element_size(), 0)
            if int(status) != 0:
                raise ConfigError(
                    "optim.state_device=host",
                    found=f"no {format_bytes(buffer.numel() * buffer.element_size())} of page-locked memory (CUDA error {int(status)})",
                    expected="room for the gradients and weights that travel between host and device",
                    hint="raise the limit of locked memory (ulimit -l), fewer ranks a node, or optim.state_device=device",
                )
        return buffer


class Staging:
    """Keeps host buffers by size, made when first needed and handed out again. Callable from any thread."""

    def __init__(self, link: Link, dtype: torch.dtype) -> None:
        self._link, self._dtype = link, dtype
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._lock = threading.Lock()
        self.num_bytes = 0
        """Bytes of all buffers made so far."""

    def take(self, num_elements: int) -> Tensor:
        with self._lock:
            if self._free[num_elements]:
                return self._free[num_elements].pop()
            self.num_bytes += num_elements * self._dtype.itemsize
        return self._link.host_buffer(num_elements, self._dtype)

    def give_back(self, buffer: Tensor) -> None:
        with self._lock:
            self._free[buffer.numel()].append(buffer)


def cut(buffer: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of consecutive parts of a flat buffer, one for each shape."""
    parts = buffer.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

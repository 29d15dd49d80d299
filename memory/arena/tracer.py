"""Live bytes of a piece of training, counted exactly: every storage from the operation that makes it to its last owner.

Deterministic on CPU: after one warm-up step two runs give the same events, so peaks may be compared byte for byte.
Time is the index of an event, not of an operation: an operation allocates its output before its dead inputs go.
Kernels' own scratch memory is not seen. Works on real tensors and under FakeTensorMode alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .trace import Trace, trace_of


class StorageTracer(TorchDispatchMode):
    """Use as a context manager; `external` tensors (weights, optimizer states) are live from the start.

    host: whether the storage at an address is host memory that stands beside the device's even where both are the CPU's
    (HostStore.owns): it is left out of everything. Landing buffers, which parcels come back into, are the device's and count.
    events: (bytes gained or lost, what made it), in order. `live_bytes` and `peak_bytes` follow from them.
    """

    def __init__(self, external: Iterable[Tensor] = (), *, host: Callable[[int], bool] | None = None) -> None:
        super().__init__()
        self._host = host
        self.events: list[tuple[int, str]] = []
        self.requests: list[tuple[int, int]] = []
        """(number, bytes) of each storage that came, (number, 0) when it went: see `trace`."""
        self.live_bytes = self.peak_bytes = 0
        self.live: dict[int, tuple[int, str]] = {}
        self.at_peak: dict[int, tuple[int, str]] = {}
        self._numbers: dict[int, int] = {}
        self._made = 0
        self._finalizers: list[Any] = []
        self._resize: Callable[..., Any] | None = None
        for tensor in external:
            self._see(tensor, "external")
        self.requests.clear()

    def trace(self) -> Trace:
        """Every storage that came while this was active; what was there before is no part of it."""
        return trace_of(self.requests)

    def __enter__(self) -> StorageTracer:
        # FSDP2 frees gathered weights by resizing their storage, which no dispatcher sees.
        self._resize = torch.UntypedStorage.resize_
        tracer, resize = self, self._resize

        def resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracer._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[method-assign,assignment]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._resize is not None
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)
        for finalizer in self._finalizers:
            finalizer.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value, str(func))
        return out

    def _see(self, tensor: Tensor, made_by: str) -> None:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        key = storage._cdata
        if key in self.live or (self._host is not None and self._host(storage.data_ptr())):
            return
        self.live[key] = (0, made_by)
        finalizer = weakref.finalize(storage, self._gone, key)
        finalizer.atexit = False
        self._finalizers.append(finalizer)
        self._change(key, storage.nbytes())

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.live:
            self._change(storage._cdata, storage.nbytes())

    def _gone(self, key: int) -> None:
        self._change(key, 0)
        self.live.pop(key, None)

    def _change(self, key: int, num_bytes: int) -> None:
        before, made_by = self.live[key]
        if num_bytes == before:
            return
        self.live[key] = (num_bytes, made_by)
        self._request(key, before, num_bytes)
        self.live_bytes += num_bytes - before
        self.events.append((num_bytes - before, made_by))
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.at_peak = dict(self.live)

    def _request(self, key: int, before: int, num_bytes: int) -> None:
        """A storage that changes its size is a release and a new allocation."""
        if before:
            self.requests.append((self._numbers.pop(key), 0))
        if num_bytes:
            self._made += 1
            self._numbers[key] = self._made
            self.requests.append((self._made, num_bytes))

    def peak_by_maker(self) -> list[tuple[str, int, int]]:
        """(what made it, number, bytes) of everything live at the peak, largest first."""
        sums: dict[str, tuple[int, int]] = {}
        for num_bytes, made_by in self.at_peak.values():
            count, total = sums.get(made_by, (0, 0))
            sums[made_by] = (count + (num_bytes > 0), total + num_bytes)
        return sorted(((name, count, total) for name, (count, total) in sums.items() if total), key=lambda row: -row[2])

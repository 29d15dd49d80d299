"""The arena on CUDA: cuda.cpp built against the CUDA runtime and put in the place of torch's allocator. Not yet run on a GPU.

Note: why not a MemPool. torch.cuda.MemPool takes a pluggable allocator too, but the caching allocator stays in front of it: it asks
for segments of 2 MiB and more and keeps what is freed (pytorch#145168), so addresses planned for tensors would not reach them.
`change_current_allocator` has no such layer. What is lost with the caching allocator are its statistics, its snapshots and
CUDA graphs; the guard's own counts take their place.
"""

from __future__ import annotations

import ctypes
import site
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ...errors import ConfigError
from .build import build, cuda_recipe, default_cache
from .replay import Arena

ALIGNMENT = 512
"""Bytes, as torch's own allocator on CUDA."""


class CudaArena(Arena):
    """One device, and the stream that is current when a step begins."""

    def _owner(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def device_peak_bytes(self) -> int | None:
        peak = self._library.arena_cuda_peak
        peak.restype = ctypes.c_int64
        return int(peak()) + self.reserved_bytes


def open_cuda_arena(cache: Path | None = None) -> CudaArena:
    """Replace torch's CUDA allocator in this process, which must not have touched a GPU yet. ConfigError where it cannot be built."""
    path = build(cuda_recipe(*find_runtime(_roots())), cache or default_cache())
    pluggable = torch.cuda.memory.CUDAPluggableAllocator(str(path), "arena_cuda_alloc", "arena_cuda_free")
    library = ctypes.CDLL(str(path))
    record = ctypes.cast(library.arena_cuda_record_stream, ctypes.c_void_p).value
    pluggable.allocator().set_record_stream_fn(record)  # type: ignore[attr-defined]
    torch.cuda.memory.change_current_allocator(pluggable)
    return CudaArena(library, ALIGNMENT)


def find_runtime(roots: Iterable[Path]) -> tuple[Path, Path]:
    """(folder of cuda_runtime_api.h, libcudart.so*) under the first root that has both. ConfigError where none has."""
    roots = tuple(roots)
    for root in roots:
        header = root / "include" / "cuda_runtime_api.h"
        libraries = sorted(path for folder in ("lib64", "lib") for path in (root / folder).glob("libcudart.so*"))
        if header.is_file() and (header.parent / "crt" / "host_defines.h").is_file() and libraries:
            return header.parent, libraries[0]
    raise ConfigError(
        "memory.arena=planned",
        found=f"no CUDA headers (looked for include/cuda_runtime_api.h and include/crt in {', '.join(map(str, roots)) or 'no place'})",
        expected="those of the CUDA that torch was built with, to build the arena's allocator on first use",
        hint="install the CUDA toolkit and set CUDA_HOME, or pip install nvidia-cuda-runtime nvidia-cuda-crt, or memory.arena=default",
    )


def _roots() -> Iterator[Path]:
    """The toolkit as torch finds it, then NVIDIA's wheels, which torch depends on."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is not None:
        yield Path(CUDA_HOME)
    for folder in site.getsitepackages():
        yield from sorted((Path(folder) / "nvidia").glob("cu[0-9]*"))
        yield Path(folder) / "nvidia" / "cuda_runtime"

"""The real training function on ranks of which one has little memory; `python oom_side.py ARGUMENTS` is the efflaunch command with it.

OOM_RANK: that rank. OOM_KIND: `tensors`, an allocator that gives out OOM_BYTES in all; `process`, which may grow by OOM_BYTES
(a limit of the kernel); or `host`, whose memory counts as low below OOM_BYTES. The first two from the second step on.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import nullcontext
from typing import Any

MIB = 1 << 20


def train(config: Any, run_dir: Any, stop: Any, pulse: Any) -> int:
    """training.trainer.train under the limit."""
    from efflaunch.training import trainer as run

    if os.environ["OOM_KIND"] == "host":
        run.LOW_HOST_BYTES = int(os.environ["OOM_BYTES"])  # type: ignore[misc]
    elif int(os.environ["RANK"]) == int(os.environ["OOM_RANK"]):
        run._Run._step = limited(run._Run._step)  # type: ignore[method-assign]
    return run.train(config, run_dir, stop, pulse)


def limited(step: Any) -> Any:
    """`_step` that has the limit from the second step on."""

    def with_limit(self: Any, stop: Any) -> bool:
        if self.done == 0:
            return bool(step(self, stop))
        size = int(os.environ["OOM_BYTES"])
        if os.environ["OOM_KIND"] == "process" and self.done == 1:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + size, resource.RLIM_INFINITY))
        with limited_allocator(size) if os.environ["OOM_KIND"] == "tensors" else nullcontext():
            return bool(step(self, stop))

    return with_limit


def address_space() -> int:
    """Bytes this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def limited_allocator(size: int) -> Any:
    """A device of `size` bytes for what is allocated inside."""
    import torch

    from efflaunch.memory.arena.tracer import StorageTracer

    class Limited(StorageTracer):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = self.live_bytes
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if self.live_bytes > size and self.live_bytes > before:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {(self.live_bytes - before) / MIB:.2f} MiB.")
            return out

    return Limited()


if __name__ == "__main__":
    from efflaunch.tests.other_training import run_with

    sys.exit(run_with("efflaunch.tests.oom_side:train"))

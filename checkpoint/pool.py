"""Holds the snapshot pool: anonymous shared memory of a trainer and its flusher. It vanishes with the last of the two."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile

import torch
from torch import Tensor

from ..utils.helper_thread import HelperThread
from ..utils.pages import advise_huge_pages, pieces, touch

log = logging.getLogger(__name__)


class Pool:
    """`num_bytes` of shared memory. Pages are touched in the background (first touch is slow), then pinned on CUDA.

    `unit_bytes`: no copy crosses a multiple of it, and so none goes from one pinned piece into the next.
    """

    def __init__(self, num_bytes: int, device: torch.device, unit_bytes: int = 1) -> None:
        self.num_bytes, self.device, self._unit_bytes = num_bytes, device, unit_bytes
        self.descriptor = _anonymous_file()
        os.ftruncate(self.descriptor, num_bytes)
        self._map = mmap.mmap(self.descriptor, num_bytes)
        self.view: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = self.view.data_ptr()
        self._pinned: list[int] = []
        self._ready = HelperThread(self._prepare, "snapshot pool")
        self._ready.start()

    def wait_ready(self) -> None:
        """Wait until every page is there, and pinned on CUDA."""
        self._ready.join()

    def _prepare(self) -> None:
        if self.device.type != "cuda":
            # The cores have ranks' work to do.
            touch(self.view, threads=1)
            return
        advise_huge_pages(self._map)
        touch(self.view)
        torch.cuda.set_device(self.device)
        for start, length in pieces(self.num_bytes, self._unit_bytes):
            code = int(torch.cuda.cudart().cudaHostRegister(self.address + start, length, 0))
            if code != 0:
                log.warning("%d bytes for snapshots cannot be page-locked (CUDA error %d): copies to the host are slower", length, code)
                return
            self._pinned.append(self.address + start)

    def close(self) -> None:
        """Close this end; the flusher keeps its own mapping for as long as it needs it."""
        self._ready.join()
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())
        os.close(self.descriptor)
        del self.view
        # The mapping goes when its last view does.


def _anonymous_file() -> int:
    """Create memory that no path names, so that nothing stays behind whoever is killed."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("efflaunch-snapshot")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def copy_memory(target: int, source: int | bytes, num_bytes: int) -> None:
    """Copy memory to an address on this thread alone; other Python threads run meanwhile (torch's copy would start a team)."""
    ctypes.memmove(target, source, num_bytes)

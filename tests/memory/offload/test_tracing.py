"""Traced on a CPU, what is on the host does not count and what comes back does: as on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efflaunch.memory.arena.tracer import StorageTracer
from efflaunch.memory.offload.open import open_store

KIB = 1024
CPU = torch.device("cpu")


@pytest.mark.parametrize("where", ["memory", "file"])
def test_offloaded_bytes_do_not_count_and_landing_buffers_do(tmp_path: Path, where: str) -> None:
    store = open_store(
        device=CPU,
        capacity_bytes=1 << 20,
        offload_dir=str(tmp_path) if where == "file" else None,
        piece_bytes=64 * KIB,
        staging_bytes=256 * KIB,
    )
    with StorageTracer(host=store.owns) as tracer:
        parcels = []
        for _ in range(6):
            rows = torch.zeros(32 * KIB)
            parcels.append(store.put(rows))
            del rows
        assert (tracer.live_bytes, tracer.peak_bytes) == (0, 128 * KIB), "one source at a time: its copy is done when put returns"
        last, before = parcels[-1], parcels[-2]
        store.prefetch(last)
        store.prefetch(before)
        assert tracer.live_bytes == 2 * 128 * KIB
        tensor = store.get(last)
        assert tracer.live_bytes == 2 * 128 * KIB, "it lies in its landing buffer"
        store.done(last)
        assert tracer.live_bytes == 2 * 128 * KIB, "whoever holds the tensor holds the buffer"
        del tensor
        assert tracer.live_bytes == 128 * KIB
        store.drop(before)
        assert (tracer.live_bytes, tracer.peak_bytes) == (0, 2 * 128 * KIB)
    store.close()


def test_without_a_filter_the_tracer_counts_all_of_the_arena() -> None:
    store = open_store(device=CPU, capacity_bytes=1 << 20)
    with StorageTracer() as tracer:
        store.put(torch.zeros(KIB))
    assert tracer.peak_bytes == (1 << 20) + 4 * KIB
    store.close()

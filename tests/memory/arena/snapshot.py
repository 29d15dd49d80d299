"""Writes snapshot.pickle: a memory history as torch.cuda.memory._snapshot lays it out, by hand. `python snapshot.py`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any


def entry(action: str, address: int, size: int, **more: Any) -> dict[str, Any]:
    frames = [{"name": "step", "filename": "train.py", "line": 1}]
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": frames, "time_us": 0, "compile_context": "N/A", **more}


HISTORY = [
    entry("free_requested", 50, 512),
    entry("free_completed", 50, 512),
    entry("segment_alloc", 1 << 20, 2 << 20),
    entry("alloc", 1 << 20, 1000),
    entry("alloc", (1 << 20) + 1024, 4096),
    entry("free_requested", 1 << 20, 1000),
    entry("free_completed", 1 << 20, 1000),
    entry("alloc", 1 << 20, 512),
    {"action": "oom", "device_free": 0, "size": 1 << 40, "stream": 0, "frames": [], "time_us": 0},
    entry("alloc", (1 << 20) + 8192, 2048),
    entry("free_requested", (1 << 20) + 8192, 2048),
    entry("free_requested", (1 << 20) + 1024, 4096),
    entry("free_completed", (1 << 20) + 8192, 2048),
    entry("segment_free", 1 << 21, 2 << 20),
    entry("snapshot", 0, 0),
]

if __name__ == "__main__":
    state = {"segments": [], "device_traces": [HISTORY, []], "allocator_settings": {"expandable_segments": False}}
    (Path(__file__).parent / "snapshot.pickle").write_bytes(pickle.dumps(state, protocol=4))

"""A benchmark on fresh gloo ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_fresh_ranks(main: Callable[..., None], ranks: int, *arguments: Any) -> dict[str, Any]:
    """`main(rank, ranks, store, *arguments, results)` on new processes; what rank 0 puts into `results`. None outlives the call."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="efflaunch-bench-") as folder:
        results = context.SimpleQueue()
        passed = (ranks, Path(folder) / "store", *arguments, results)
        workers = [context.Process(target=main, args=(rank, *passed), daemon=True) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
            failed = [rank for rank, worker in enumerate(workers) if worker.exitcode]
            if failed:
                raise RuntimeError(f"ranks {failed} failed; their tracebacks are above")
            result: dict[str, Any] = results.get()
            return result
        finally:
            for worker in workers:
                worker.kill()

"""`efflaunch export`: a checkpoint as a Hugging Face directory, with progress."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ...errors import EXIT_DONE
from ...training.config import Dtype
from ...units import format_bytes
from ..rundir.run_dir import read_run


def main(run_dir: Path, out_dir: Path, *, step: int | None, dtype: str, as_json: bool) -> int:
    """Write `out_dir`; a line per file of weights, then where it is. Errors are the export's own (exit code 93)."""
    read_run(run_dir)
    from ...model.export import export

    def progress(done: int, total: int) -> None:
        if not as_json:
            print(f"{format_bytes(done)} of {format_bytes(total)}", file=sys.stderr, flush=True)

    report = export(run_dir, out_dir, step, dtype=Dtype(dtype), on_progress=progress)
    if as_json:
        print(json.dumps(asdict(report), default=str))
        return EXIT_DONE
    print(f"wrote {report.path}: step {report.step}, {report.num_parameters:,} weights in {dtype}, {format_bytes(report.num_bytes)}")
    print(f"tokenizer: {report.tokenizer or 'none known on this machine, copy it there yourself'}")
    return EXIT_DONE

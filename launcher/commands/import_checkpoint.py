"""`efflaunch import`: a DeepSpeed checkpoint as a Hugging Face model directory, with progress."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ...errors import EXIT_DONE
from ...training.config import Dtype
from ...units import format_bytes
from .arguments import CommandParser, add_json

DESCRIPTION = (
    "Write the float32 weights of a DeepSpeed checkpoint, ZeRO's of stages 1 to 3 or a universal one, as a model directory: for "
    "model.path, and for Hugging Face's from_pretrained. Nothing in its files is run, and DeepSpeed is not needed."
)
PROGRESS_BYTES = 256 << 20
"""A line of progress after so many bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch import`."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what save_checkpoint wrote, or one folder of it")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL_DIR", help="a new or empty directory")
    parser.add_argument("--model", type=Path, metavar="DIR", help="of config.json and tokenizer; beside CHECKPOINT if not given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights; float32 is what was trained")
    add_json(parser, "what was written, as JSON")


def main(words: list[str]) -> int:
    """Run `efflaunch import` and return its exit code."""
    parser = CommandParser("import", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    return import_checkpoint(options.checkpoint, options.out, options.model, dtype=options.dtype, as_json=options.json)


def import_checkpoint(checkpoint: Path, out_dir: Path, model: Path | None, *, dtype: str, as_json: bool) -> int:
    """Write `out_dir`; lines of progress, then what is where. Errors are the import's own (exit code 93)."""
    from ...model.import_model import import_model

    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if not as_json and (done - shown >= PROGRESS_BYTES or done == total):
            shown = done
            print(f"{100 * done // max(1, total)} % of reading and writing {format_bytes(total)}", file=sys.stderr, flush=True)

    report = import_model(checkpoint, out_dir, model, dtype=Dtype(dtype), on_progress=progress)
    if as_json:
        print(json.dumps(asdict(report), default=str))
        return EXIT_DONE
    print(f"wrote {report.path}: {report.num_parameters:,} weights in {dtype}, {format_bytes(report.num_bytes)}")
    print(f"from {report.checkpoint}: {report.about}; config.json of {report.model}")
    print(f"tokenizer: {report.tokenizer or 'none beside config.json, copy it there yourself'}")
    for note in report.notes:
        print(f"note: {note}")
    return EXIT_DONE

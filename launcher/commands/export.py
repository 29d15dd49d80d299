"""`efflaunch export`: a checkpoint as a Hugging Face directory, with progress."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ...errors import EXIT_DONE
from ...training.config import Dtype
from ...units import format_bytes
from ..rundir.run_dir import read_run
from .arguments import STEP, CommandParser, add_json, add_run_dir, number_in

DESCRIPTION = "Write a checkpoint as a directory that Hugging Face's from_pretrained loads; of adapters, one that peft loads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch export`."""
    add_run_dir(parser)
    parser.add_argument("out_dir", type=Path, metavar="OUT")
    parser.add_argument("--step", type=number_in(int, STEP), help="of which checkpoint; the newest if not given")
    words = "of the weights; training keeps float32. bfloat16 if not given, float32 for adapters"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help=words)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="of a run with adapters: the whole model, adapters added to their matrices")
    form.add_argument("--base", action="store_true", help="of a run with adapters: the frozen model alone")
    add_json(parser, "what was written, as JSON")


def main(words: list[str]) -> int:
    """Run `efflaunch export` and return its exit code."""
    parser = CommandParser("export", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    form = "merged" if options.merge else "base" if options.base else "adapter"
    return export_run(options.run_dir, options.out_dir, step=options.step, dtype=options.dtype, as_json=options.json, form=form)


def export_run(run_dir: Path, out_dir: Path, *, step: int | None, dtype: str | None, as_json: bool, form: str = "adapter") -> int:
    """Write `out_dir`; a line per file of weights, then where it is. Errors are the export's own (exit code 93).

    `dtype` None: bfloat16, or float32 for adapters, which are small and which peft keeps in it.
    """
    stored = read_run(run_dir).config
    dtype = dtype or ("float32" if stored.adapter.is_trained and form == "adapter" else "bfloat16")
    from ...model.export import Form, export

    def progress(done: int, total: int) -> None:
        if not as_json:
            print(f"{format_bytes(done)} of {format_bytes(total)}", file=sys.stderr, flush=True)

    report = export(run_dir, out_dir, step, dtype=Dtype(dtype), form=Form(form), on_progress=progress)
    if as_json:
        print(json.dumps(asdict(report), default=str))
        return EXIT_DONE
    print(f"wrote {report.path}: step {report.step}, {report.num_parameters:,} weights in {dtype}, {format_bytes(report.num_bytes)}")
    print(f"tokenizer: {report.tokenizer or 'none known on this machine, copy it there yourself'}")
    if report.chat_template is not None:
        whose = {"tokenizer": "the tokenizer's own", "corpus": "the one the corpus was made with"}[report.chat_template]
        stops = "" if report.end_of_turn is None else f"; generation stops at {report.end_of_turn}"
        print(f"chat template: {whose}{stops}")
    for note in report.notes:
        print(f"note: {note}")
    return EXIT_DONE

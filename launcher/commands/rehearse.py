"""`efflaunch rehearse`: an experiment in miniature on this machine, so that a mistake is found before nodes are booked."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from pathlib import Path

from ...errors import EXIT_DONE
from ...training.config import Objective
from ...utils.ranges import Range
from ...utils.text import typed
from ..config.rehearsal import STEPS, Rehearsal, rehearsal
from ..config.run_config import Config
from .arguments import CommandParser, add_config_arguments, number_in, token_count

DESCRIPTION = (
    "Run any experiment in miniature on CPU ranks of this machine: its family, objective, policies and axes in tiny sizes; train, save, "
    "resume. Takes about a minute, and says what it could not rehearse."
)
_RANKS = Range(1, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch rehearse`."""
    add_config_arguments(parser)
    parser.add_argument("--ranks", type=number_in(int, _RANKS), default=4, metavar="N", help="CPU ranks to start (default: 4)")
    parser.add_argument("--tokens", type=token_count, default=2048, metavar="TOKENS", help="its longest sequence (default: 2K)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be rehearsed, and the command, and stop")


def main(words: list[str]) -> int:
    """Rehearse what the command line asks for; returns the job's exit code."""
    from .. import start
    from ..checks import check_memory_plan
    from ..config.compose import compose

    parser = CommandParser("rehearse", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    config = compose(options.overrides, options.config_dir)
    check_memory_plan(config)
    small = rehearsal(config, ranks=options.ranks, tokens=options.tokens)
    overrides = [*options.overrides, *small.overrides]
    if options.print_config:
        return start.show_config(compose(overrides, options.config_dir))
    print("\n".join(lines(config, small)), flush=True)
    if options.dry_run:
        own = ["--config-dir", options.config_dir] if options.config_dir else []
        print(typed("train", *own, *overrides))
        return EXIT_DONE
    return _run(config, overrides, options.config_dir)


def lines(config: Config, small: Rehearsal) -> list[str]:
    """What is rehearsed, and what is not, as lines of text."""
    out = [f"rehearsing {config.experiment}, as at full size:", *(f"  {line}" for line in small.same)]
    return [*out, "not rehearsed:", *(f"  {line}" for line in small.left_out)]


def _run(config: Config, overrides: list[str], config_dir: str | None) -> int:
    from .. import start
    from ..rundir.run_dir import make_run_id

    run_id = make_run_id(f"rehearsal-{config.experiment}")
    run_dir = Path(config.run.root) / run_id
    if config.train.objective is not Objective.LANGUAGE_MODELLING:
        overrides = [*overrides, *_make_corpus(config.train.objective, run_dir.with_name(f"{run_id}-data"))]
    code = start.train([*overrides, f"run.id={run_id}"], config_dir)
    if code == EXIT_DONE:
        code = start.resume(run_dir, [f"train.steps={STEPS}"], config_dir)
    if code == EXIT_DONE:
        print(f"rehearsed: {config.experiment} trained, saved and resumed; rm -r {shlex.quote(str(run_dir))}* removes what it left")
    return code


def _make_corpus(objective: Objective, folder: Path) -> list[str]:
    """Write documents of this objective with a tokenizer of their own below `folder`; returns the overrides that read them."""
    from . import data

    folder.mkdir(parents=True)
    records = folder / "records.jsonl"
    records.write_text("".join(f"{json.dumps(record)}\n" for record in _records(objective)), encoding="utf-8")
    print(f"making a corpus for {objective.value} in {folder}", file=sys.stderr, flush=True)
    data.main(["tokenizer", str(records), "--vocab-size", "400", "--out", str(folder / "tokenizer")])
    data.main(["prepare", str(records), "--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "corpus")])
    return [f"data.prefixes=[{folder / 'corpus'}]", f"data.tokenizer={folder / 'tokenizer'}", "data.vocab_size=null"]


def _records(objective: Objective) -> list[dict[str, object]]:
    """A few hundred prompts of unequal lengths with answers to prefer or to reward; the same ones each time."""
    draw, found = random.Random(0), list[dict[str, object]]()
    for _ in range(300):
        prompt = "What follows " + ", ".join(str(draw.randrange(1000)) for _ in range(draw.randrange(2, 60))) + "?"
        answers = [f" {draw.randrange(1000)} it is." for _ in range(4)]
        if objective is Objective.DPO:
            found.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        else:
            rewarded = [{"text": text, "reward": float(number % 2)} for number, text in enumerate(answers)]
            found.append({"prompt": prompt, "completions": rewarded})
    return found

"""`efflaunch evaluate`: the loss of a run's checkpoint, or of a model directory, on held-out corpora, without training."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError
from ...training.reporting.config import Display
from ...units import format_tokens
from ...utils.text import typed
from ..agent.signals import stop_signals_kept
from ..config.run_config import Backend, Config, LauncherConfig, RunConfig
from ..output import steady_output
from .arguments import STEP, CommandParser, add_json, add_own_files, number_in

ENTRY = f"{__package__.partition('.')[0]}.training.evaluation.alone:evaluate"
DESCRIPTION = "Evaluate a run's checkpoint, or a Hugging Face model directory, on held-out corpora: eval.corpora={web: PREFIX}."
_FOR_MODELS = {
    "model": "pretrained",
    "data": "indexed",
    "cluster": "local_cpu",
    "train.steps": "1",
    "train.dtype": "float32",
}
"""What is chosen for a model directory, unless it is typed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch evaluate`."""
    parser.add_argument("place", type=Path, metavar="RUN_DIR|MODEL_DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="eval.lengths=[8K,128K], and whatever train takes")
    parser.add_argument("--step", type=number_in(int, STEP), help="of which checkpoint; the newest if not given")
    add_own_files(parser)
    add_json(parser, "the results as JSON, and nothing else")


def main(words: list[str]) -> int:
    """Run `efflaunch evaluate` and return its exit code."""
    parser = CommandParser("evaluate", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    place: Path = options.place
    if (place / "run.yaml").is_file():
        return evaluate_run(place, options.overrides, options.config_dir, step=options.step, as_json=options.json)
    if options.step is not None or not (place / "config.json").is_file():
        raise ConfigError(
            str(place),
            found="no run.yaml" + ("" if options.step is not None else " and no config.json"),
            expected="a run directory" + ("" if options.step is not None else ", or a model directory of Hugging Face's"),
            hint="efflaunch evaluate runs/NAME, or efflaunch evaluate MODEL_DIR",
        )
    return evaluate_model(place, options.overrides, options.config_dir, as_json=options.json)


def evaluate_run(run_dir: Path, overrides: list[str], config_dir: str | None, *, step: int | None, as_json: bool) -> int:
    """Evaluate a checkpoint with the run's own configuration and `overrides` on top of it."""
    from ...model.export import choose_checkpoint
    from ..config.compose import changed
    from ..config.overrides import parse_overrides
    from ..rundir.run_dir import read_run

    config = read_run(run_dir).config
    # It follows metrics of training, perhaps of corpora that are not asked for here; nor are steps taken.
    config = replace(config, train=replace(config.train, keep_best=None, patience=None, stages=[]))
    if overrides:
        config = changed(config, parse_overrides(overrides, config_dir), config_dir)
    _check_corpora(config, run_dir)
    info = choose_checkpoint(run_dir, step)
    return _evaluate(config, str(run_dir), {"checkpoint": str(info.path.absolute()), "step": info.step}, as_json)


def evaluate_model(folder: Path, overrides: list[str], config_dir: str | None, *, as_json: bool) -> int:
    """Evaluate the weights of a model directory; the layout is this machine's CPUs unless `overrides` say otherwise."""
    from ..config.compose import compose

    typed_keys = {text.partition("=")[0].lstrip("+") for text in overrides}
    chosen = [f"{key}={value}" for key, value in _FOR_MODELS.items() if key not in typed_keys]
    config = compose([*chosen, *overrides, f"model.path={json.dumps(str(folder.absolute()))}"], config_dir)
    _check_corpora(config, folder)
    return _evaluate(config, str(folder), {"checkpoint": None, "step": None}, as_json)


def _check_corpora(config: Config, place: Path) -> None:
    """Refuse here what the ranks would refuse."""
    from ...model.spec import model_spec
    from ...training.evaluation.corpus import open_corpora
    from ...training.evaluation.needles import check_needles, needle_tokenizer

    if not config.eval.is_on:
        hint = typed("evaluate", place, "eval.corpora={web: PREFIX}")
        raise ConfigError("eval.corpora", found="none", expected="corpora to evaluate on", hint=hint)
    open_corpora(
        config.eval,
        max_seq_len=config.data.max_seq_len,
        vocab_size=model_spec(config.model).vocab_size,
        tokenizer=config.data.tokenizer,
    )
    check_needles(config.eval, needle_tokenizer(config.eval, config.data), model_spec(config.model).vocab_size)


def _evaluate(config: Config, name: str, request: dict[str, Any], as_json: bool) -> int:
    from ...training.evaluation.alone import read_results
    from ..machine_checks import check_machine
    from ..rundir.metrics_reader import MetricsFollower

    launcher = LauncherConfig(name="local", backend=Backend.LOCAL, max_restarts=0, threads_per_rank=config.launcher.threads_per_rank)
    display = Display.QUIET if as_json else Display.PLAIN
    config = replace(config, launcher=launcher, logging=replace(config.logging, display=display))
    check_machine(config)
    with tempfile.TemporaryDirectory(prefix="efflaunch-evaluate-") as folder:
        run_dir = Path(folder) / "evaluation"
        code = _run(config, run_dir, request)
        results = read_results(MetricsFollower(run_dir).read())
    if code == EXIT_PREEMPTED:
        print("stopped: an evaluation that is not whole says nothing")
    if code != EXIT_DONE:
        return code
    facts = {"place": name, "step": request["step"], "corpora": results}
    print(json.dumps(facts, indent=1) if as_json else "\n".join(describe(facts)))
    return EXIT_DONE


def _run(config: Config, run_dir: Path, request: dict[str, Any]) -> int:
    from ...training.evaluation.alone import REQUEST_FILE
    from .. import local
    from ..end_report import print_failure
    from ..rundir.lock import lock_run
    from ..rundir.run_dir import make_run_dir, store_config

    config = replace(config, run=RunConfig(root=str(run_dir.parent), id=run_dir.name, private=False))  # inside a private folder already
    make_run_dir(run_dir, private=False)
    (run_dir / REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")
    lock = lock_run(run_dir)
    revision, _ = store_config(run_dir, config)
    with steady_output() as output, stop_signals_kept():
        code = local.run(config, run_dir, revision=revision, lock=lock, output=output, entry=ENTRY)
    if code not in (EXIT_DONE, EXIT_PREEMPTED):
        print_failure(run_dir)
    return code


def describe(facts: dict[str, Any]) -> list[str]:
    """Results as lines of text."""
    step = "" if facts["step"] is None else f", step {facts['step']}"
    lines = [f"{facts['place']}{step}"]
    for corpus in facts["corpora"]:
        lines.append(f"{corpus['corpus']}: loss {_loss(corpus['loss'])} over {corpus['targets']:,} targets")
        lines += [f"  {format_tokens(row['length']):>8} of context  {_loss(row['loss'])}" for row in corpus["lengths"]]
        if corpus["context"]:
            context = corpus["context"]
            kept = format_tokens(context["tokens"])
            lines.append(
                f"  beyond {kept}: {_loss(context['loss'])}, with the last {kept} alone {_loss(context['short_loss'])}: "
                f"the rest of the context is worth {_loss(context['gain'])}"
            )
        if corpus.get("needles"):
            lines += needle_lines(corpus["needles"])
            continue
        lines.append("  loss by tokens of context, up to")
        lines += [f"  {format_tokens(row['up_to']):>8}  {_loss(row['loss'])}  {row['targets']:>12,} targets" for row in corpus["positions"]]
    return lines


def needle_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Share of exact answers of each task at each length, from the shallowest needle to the deepest."""
    found: dict[tuple[str, int], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["depth"]):
        found.setdefault((row["task"], row["length"]), []).append(f"{row['exact']:.0%} at {row['depth']:g}")
    return [f"  {task:<11} {format_tokens(length):>8}  exact: {', '.join(shares)}" for (task, length), shares in found.items()]


def _loss(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"

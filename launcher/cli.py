"""The `efflaunch` command: its first word, its options, and what becomes of errors.

Imports nothing heavy at module level: `efflaunch --help` and shell completion must answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, EfflaunchError
from ..ranges import LONG_S, STEPS, Range
from .unexpected import DEBUG, report_unexpected

Command = Callable[[list[str]], int]
_STEP, _SEQUENCES, _SEARCH_S = Range(0, STEPS), Range(1, 1_000_000), Range(0, LONG_S, above=True)

SUMMARY = {
    "train": "train, or go on with the run of the same run.id (the default command)",
    "sweep": "one run for every combination of key=a,b values",
    "plan": "what a run would need: layout, memory per term, time; needs no GPU",
    "profile": "measure this machine for a configuration; planning then goes by what was measured",
    "resume": "go on with a run directory, with changes if wanted",
    "status": "where a run stands",
    "logs": "what its ranks printed, the one that failed first last and in full",
    "cancel": "have a run save and stop",
    "checkpoints": "what a run has saved, where, and whether every byte is whole",
    "explain": "one step of a run: who held which sequences, why, and how far from the best",
    "simulate": "modelled step times of several planners, on clusters of any size",
    "export": "write a checkpoint as a Hugging Face model directory",
    "data": "data prepare: text, JSONL, Parquet -> indexed corpus",
    "completion": "print a script for tab completion: bash, zsh or fish",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; the return value is the exit code (0, 75, 93 or 1)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != DEBUG]
    try:
        return _dispatch(words)
    except EfflaunchError as error:
        print(f"efflaunch: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("efflaunch: interrupted; nothing was running", file=sys.stderr)
        return EXIT_PREEMPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted.
        sys.stderr.close()
        return EXIT_DONE
    except Exception as error:  # the last handler: what nobody foresaw is one paragraph too
        return report_unexpected(error, words, debug=len(words) < len(given))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help_text())
        return EXIT_DONE
    if words[0] == "--version":
        print(f"efflaunch {__version__}")
        return EXIT_DONE
    commands = _commands()
    if words[0] in commands:
        return commands[words[0]](words[1:])
    if "=" not in words[0] and not words[0].startswith("-"):
        raise _unknown_command(words[0])
    return _train(words)


def _commands() -> dict[str, Command]:
    return {
        "train": _train,
        "sweep": _sweep,
        "plan": _plan,
        "profile": _profile,
        "resume": _resume,
        "status": _status,
        "logs": _logs,
        "cancel": _cancel,
        "checkpoints": _checkpoints,
        "explain": _explain,
        "simulate": _simulate,
        "export": _export,
        "data": _data,
        "completion": _completion,
    }


def _unknown_command(word: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(word, list(SUMMARY), 1)
    hint = f"efflaunch {near[0]}" if near else "efflaunch --help"
    return ConfigError("command line", found=f"{word!r}", expected=f"a command ({', '.join(SUMMARY)}) or key=value", hint=hint)


def _train(words: list[str]) -> int:
    parser = _config_parser("train", "Train. Every argument is GROUP=OPTION, +experiment=NAME or key=value.")
    _add_dry_run(parser)
    if _asks_for_help(words):
        from .commands.help import train_help

        print(train_help(parser.format_help(), _option_value(words, "--config-dir")))
        return EXIT_DONE
    options = parser.parse_intermixed_args(words)
    from . import start

    return start.train(options.overrides, options.config_dir, print_config=options.print_config, dry_run=options.dry_run)


def _sweep(words: list[str]) -> int:
    parser = _Parser("sweep", "One run for every combination of values, optim.lr=1e-3,1e-4 train.seed=0,1. Takes the arguments of train.")
    text = "on SLURM or a Ray job server every run is a job, else they run in turn"
    parser.add_argument("overrides", nargs="+", metavar="key=a,b", help=text)
    parser.add_argument("--config-dir", metavar="DIR", help="your own configuration files")
    _add_dry_run(parser)
    options = parser.parse_intermixed_args(words)
    from .commands import sweep

    return sweep.main(options.overrides, options.config_dir, dry_run=options.dry_run)


def _plan(words: list[str]) -> int:
    parser = _config_parser("plan", "What a run would need, without running it. Takes the arguments of train.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    _add_lengths(parser, required=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --lengths: draw the step, as .svg, .png or .pdf")
    _add_certify(parser)
    options = parser.parse_intermixed_args(words)
    from .config.compose import compose

    config = compose(options.overrides, options.config_dir)
    if options.print_config:
        from .start import show_config

        return show_config(config)
    from .commands import plan

    if options.lengths is None:
        return int(plan.main(config, options.json))
    from .commands import plan_step

    request = plan_step.SimulateRequest(
        lengths=options.lengths, sequences=options.sequences, seed=options.seed, certify_s=options.certify, out=options.out
    )
    return plan_step.main(config, request, as_json=options.json)


def _add_certify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--certify", type=_number(float, _SEARCH_S), metavar="S", help="look for a tighter lower bound, for up to so many seconds"
    )


def _add_lengths(parser: argparse.ArgumentParser, *, required: bool) -> None:
    text = "wikipedia, commoncrawl, github, lognormal:MEDIAN:SIGMA, PREFIX.idx or a file of lengths"
    parser.add_argument("--lengths", metavar="FILE|DISTRIBUTION", required=required, help=text)
    parser.add_argument(
        "--sequences", type=_number(int, _SEQUENCES), metavar="N", help="sequences of a step; without it data.global_batch_tokens decides"
    )
    parser.add_argument("--seed", type=_number(int, Range(0, 1 << 63)), default=0, help="of the lengths that are drawn")


def _profile(words: list[str]) -> int:
    parser = _config_parser("profile", "Measure this machine with short probes on a configuration's ranks. Takes the arguments of train.")
    parser.add_argument("--out", type=Path, default=Path("profile.yaml"), metavar="FILE", help="where it goes, beside what is there")
    parser.add_argument("--seconds", type=_number(float, _SEARCH_S), default=60.0, help="about how long the probes may take (60)")
    parser.add_argument("--json", action="store_true", help="print the profile as JSON")
    options = parser.parse_intermixed_args(words)
    from .config.compose import compose

    config = compose(options.overrides, options.config_dir)
    if options.print_config:
        from .start import show_config

        return show_config(config)
    from .commands import profile

    return profile.main(config, options.out, options.seconds, options.json)


def _resume(words: list[str]) -> int:
    parser = _Parser("resume", "Go on from the last checkpoint, after a stop, a crash or a finished run (train.steps=MORE).")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the stored configuration")
    parser.add_argument("--config-dir", metavar="DIR", help="your own configuration files")
    _add_dry_run(parser)
    options = parser.parse_intermixed_args(words)
    from . import start

    return start.resume(options.run_dir, options.overrides, options.config_dir, dry_run=options.dry_run)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be submitted (on SLURM the script, on Ray the request), and stop"
    )


def _status(words: list[str]) -> int:
    parser = _Parser("status", "Where a run stands: state, step, loss, speed, time to go, checkpoints, last error.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(words)
    from .commands import status

    return status.main(options.run_dir, as_json=options.json)


def _logs(words: list[str]) -> int:
    parser = _Parser("logs", "What the ranks of a run's last attempt printed; the rank that failed first comes last, in full.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--lines", type=_number(int, Range(0, 1_000_000)), default=20, metavar="N", help="of every log but that rank's; 20")
    parser.add_argument("--all", action="store_true", help="every rank, not only rank 0 and the one that failed")
    options = parser.parse_args(words)
    from .commands import logs

    return logs.main(options.run_dir, num_lines=options.lines, every_rank=options.all)


def _cancel(words: list[str]) -> int:
    parser = _Parser("cancel", "Have a run finish its step, save and stop; a waiting job is taken from the queue. resume goes on.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--now", action="store_true", help="end it without waiting for a save")
    options = parser.parse_args(words)
    from .commands import logs

    return logs.cancel(options.run_dir, now=options.now)


def _checkpoints(words: list[str]) -> int:
    parser = _Parser("checkpoints", "Checkpoints of a run: state, age, size, place. Exit code 0: all is well; 93: one is damaged.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with its hash")
    parser.add_argument("--pin", type=_number(int, _STEP), metavar="STEP", help="never let retention remove this one")
    parser.add_argument("--unpin", type=_number(int, _STEP), metavar="STEP", help="let it again")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(words)
    from .commands import checkpoints

    request = checkpoints.SimulateRequest(verify=options.verify, pin=options.pin, unpin=options.unpin, as_json=options.json)
    return checkpoints.main(options.run_dir, request)


def _explain(words: list[str]) -> int:
    parser = _Parser("explain", "Who held which sequences in a step, why, what bounds it, and what other plans would have cost.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--step", type=_number(int, _STEP), help="counted from 1; the newest if not given")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the step, as .svg, .png or .pdf")
    _add_certify(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(words)
    from .commands import explain

    return explain.main(options.run_dir, step=options.step, certify_s=options.certify, out=options.out, as_json=options.json)


def _simulate(words: list[str]) -> int:
    parser = _config_parser("simulate", "Modelled step times of static, greedy, FlexSP's and our plans. Takes the arguments of train.")
    _add_lengths(parser, required=True)
    parser.add_argument("--steps", type=_number(int, Range(1, 1_000_000)), default=40, help="how many steps; 40")
    parser.add_argument(
        "--flexsp-steps",
        type=_number(int, Range(0, 1_000_000)),
        default=1,
        metavar="N",
        help="steps FlexSP's slow solver is asked for; 1, 0: none",
    )
    parser.add_argument("--flexsp-seconds", type=_number(float, _SEARCH_S), default=10.0, metavar="S", help="its limit for each MILP; 10")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_intermixed_args(words)
    from .config.compose import compose

    config = compose(options.overrides, options.config_dir)
    if options.print_config:
        from .start import show_config

        return show_config(config)
    from .commands import simulate

    return simulate.main(
        config,
        simulate.SimulateRequest(
            lengths=options.lengths,
            sequences=options.sequences,
            seed=options.seed,
            steps=options.steps,
            flexsp_steps=options.flexsp_steps,
            flexsp_s=options.flexsp_seconds,
        ),
        as_json=options.json,
    )


def _export(words: list[str]) -> int:
    parser = _Parser("export", "Write a checkpoint as a directory that Hugging Face's from_pretrained loads.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT")
    parser.add_argument("--step", type=_number(int, _STEP), help="of which checkpoint; the newest if not given")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights; training keeps float32")
    parser.add_argument("--json", action="store_true", help="what was written, as JSON")
    options = parser.parse_args(words)
    from .commands import export

    return export.main(options.run_dir, options.out_dir, step=options.step, dtype=options.dtype, as_json=options.json)


def _data(words: list[str]) -> int:
    from .commands import data

    return int(data.main(words))


def _completion(words: list[str]) -> int:
    from .commands import completion

    return completion.main(words)


def _asks_for_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


def _option_value(words: list[str], option: str) -> str | None:
    for index, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and index + 1 < len(words):
            return words[index + 1]
    return None


def _number(kind: type[int] | type[float], allowed: Range) -> Callable[[str], int | float]:
    """A reader of an option's number; the error says its range."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number, ' if kind is int else ''}{allowed}")
        return value

    return read


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: exit 93, and what to type."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"efflaunch {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, found=message, expected=self.format_usage().strip(), hint=f"{self.prog} --help")


def _config_parser(command: str, description: str) -> _Parser:
    parser = _Parser(command, description)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="train.steps=50, model=qwen3_8b, +experiment=quickstart")
    parser.add_argument("--config-dir", metavar="DIR", help="your own files, as DIR/experiment/mine.yaml or DIR/model/mine.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    return parser


def _help_text() -> str:
    width = max(map(len, SUMMARY)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, text in SUMMARY.items())
    return f"""efflaunch {__version__}: train language models on very long and very unequal sequences.

usage: efflaunch [COMMAND] [arguments]

commands:
{commands}

examples:
  efflaunch +experiment=quickstart               train a small model here, without a GPU
  efflaunch +experiment=quickstart train.steps=20 memory=keep
  efflaunch plan +experiment=llama8b_1M          what eight GPUs would have to hold
  efflaunch resume runs/NAME train.steps=200     go on, with more steps
  efflaunch explain runs/NAME --out step.svg     why the last step was planned as it was

efflaunch COMMAND --help says more; efflaunch train --help lists experiments, groups and every key. {DEBUG} shows the trace of an error
nobody foresaw, which otherwise goes to a file.
Exit codes: 0 done; 75 stopped and saved, run it again; 93 a mistake to mend first; 1 anything else."""

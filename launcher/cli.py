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

Command = Callable[[list[str]], int]

SUMMARY = {
    "train": "train, or go on with the run of the same run.id (the default command)",
    "plan": "what a run would need: layout, memory per term, time; needs no GPU",
    "resume": "go on with a run directory, with changes if wanted",
    "status": "where a run stands",
    "export": "write a checkpoint as a Hugging Face model directory",
    "data": "data prepare: text, JSONL, Parquet -> indexed corpus",
    "completion": "print a script for tab completion: bash, zsh or fish",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; the return value is the exit code (0, 75, 93 or 1)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
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
        "plan": _plan,
        "resume": _resume,
        "status": _status,
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
    if _asks_for_help(words):
        from .help import train_help

        print(train_help(parser.format_help(), _option_value(words, "--config-dir")))
        return EXIT_DONE
    options = parser.parse_intermixed_args(words)
    from . import start

    return start.train(options.overrides, options.config_dir, print_config=options.print_config)


def _plan(words: list[str]) -> int:
    parser = _config_parser("plan", "What a run would need, without running it. Takes the arguments of train.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_intermixed_args(words)
    from .compose import compose

    config = compose(options.overrides, options.config_dir)
    if options.print_config:
        from .start import show_config

        return show_config(config)
    from . import plan_command

    return int(plan_command.main(config, options.json))


def _resume(words: list[str]) -> int:
    parser = _Parser("resume", "Go on from the last checkpoint, after a stop, a crash or a finished run (train.steps=MORE).")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the stored configuration")
    parser.add_argument("--config-dir", metavar="DIR", help="your own configuration files")
    options = parser.parse_intermixed_args(words)
    from . import start

    return start.resume(options.run_dir, options.overrides, options.config_dir)


def _status(words: list[str]) -> int:
    parser = _Parser("status", "Where a run stands: state, step, loss, speed, time to go, checkpoints, last error.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(words)
    from . import status_command

    return status_command.main(options.run_dir, as_json=options.json)


def _export(words: list[str]) -> int:
    parser = _Parser("export", "Write a checkpoint as a directory that Hugging Face's from_pretrained loads.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT")
    parser.add_argument("--step", type=int, help="of which checkpoint; the newest if not given")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights; training keeps float32")
    parser.add_argument("--json", action="store_true", help="what was written, as JSON")
    options = parser.parse_args(words)
    from . import export_command

    return export_command.main(options.run_dir, options.out_dir, step=options.step, dtype=options.dtype, as_json=options.json)


def _data(words: list[str]) -> int:
    from . import data_command

    return int(data_command.main(words))


def _completion(words: list[str]) -> int:
    from . import completion

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

efflaunch COMMAND --help says more; efflaunch train --help lists experiments, groups and every key.
Exit codes: 0 done; 75 stopped and saved, run it again; 93 a mistake to mend first; 1 anything else."""

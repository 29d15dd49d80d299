"""The `efflaunch` command: its first word, its options, and what becomes of errors.

Imports nothing heavy at module level: `efflaunch --help` and shell completion must answer at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from .. import __version__
from ..errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, EfflaunchError
from ..utils.atomic_files import file_errors_named
from .commands import COMMANDS, command_module
from .output import OutputError, complain, drop_output, finish_output, open_closed_streams, plain_output, steady_output
from .unexpected import DEBUG, report_unexpected

_WORKS = ("data", "evaluate", "export", "profile")
"""Commands whose work does not end because nobody reads what they print; so do those that launch, from `start.launch` on."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; the return value is the exit code (0, 75, 93 or 1)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_closed_streams()
    with plain_output():
        return finish_output(_guarded(given))


def _guarded(given: list[str]) -> int:
    """The exit code, with errors said."""
    words = [word for word in given if word != DEBUG]
    try:
        words = [_with_home(word) for word in words]
        with file_errors_named(), steady_output() if words and words[0] in _WORKS else nullcontext():
            return _dispatch(words)
    except OutputError as error:
        return drop_output(error)
    except EfflaunchError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted; nothing was running")
        return EXIT_PREEMPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted, and this command only prints.
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
    if words[0] in COMMANDS:
        return command_module(words[0]).main(words[1:])
    if "=" not in words[0] and not words[0].startswith("-"):
        raise _unknown_command(words[0])
    return command_module("train").main(words)


def _with_home(word: str) -> str:
    """A word with `~` written out where a shell leaves it: `--out=~/x`, and a path in quotes. Overrides have their own way."""
    option, separator, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{separator}{os.path.expanduser(value)}" if value.startswith("~") else word


def _unknown_command(word: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(word, list(COMMANDS), 1)
    hint = f"efflaunch {near[0]}" if near else "efflaunch --help"
    return ConfigError("command line", found=f"{word!r}", expected=f"a command ({', '.join(COMMANDS)}) or key=value", hint=hint)


def _help_text() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items())
    return f"""efflaunch {__version__}: train language models on very long and very unequal sequences.

usage: efflaunch [COMMAND] [arguments]

commands:
{commands}

examples:
  efflaunch +experiment=quickstart               train a small model here, without a GPU
  efflaunch +experiment=quickstart train.steps=20 memory=keep
  efflaunch plan +experiment=llama8b_1M          what eight GPUs would have to hold
  efflaunch resume runs/NAME train.steps=200     resume, with more steps
  efflaunch explain runs/NAME --out step.svg     why the last step was planned as it was

efflaunch COMMAND --help says more; efflaunch train --help lists experiments, groups and every key.
{DEBUG} with any command shows the trace of an unexpected error, which otherwise goes to a file.
Exit codes: 0 done; 75 stopped and saved, run it again; 93 a mistake to mend first; 1 anything else."""

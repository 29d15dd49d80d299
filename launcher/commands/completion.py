"""Tab completion. The shells call `efflaunch completion words ...` back at each tab, so nothing heavy is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from string import Template

from ...errors import EXIT_DONE, ConfigError
from ...training.data.lengths import DISTRIBUTIONS
from ..config.conf_groups import EXPERIMENT, GROUPS, options
from ..config.schema import enum_values, walk_fields
from . import COMMANDS, command_module
from .arguments import CommandParser

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# bash: eval "$(efflaunch completion bash)"
_efflaunch() {
    # Bash cuts words at '='; put the word at the cursor together again.
    local line="${COMP_LINE:0:COMP_POINT}" word
    word="${line##*[[:space:]]}"
    local IFS=$'\\n'
    COMPREPLY=($(efflaunch completion words $line"." 2>/dev/null))
    if [[ "$word" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
    fi
    if [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" != *[=.] ]]; then
        compopt +o nospace
    fi
}
complete -o nospace -o default -F _efflaunch efflaunch
"""
_ZSH = """\
#compdef efflaunch
# zsh: eval "$(efflaunch completion zsh)", after compinit
_efflaunch() {
    local -a found
    found=("${(@f)$(efflaunch completion words "$words[1,CURRENT]." 2>/dev/null)}")
    found=(${found:#})
    (( $#found )) && compadd -Q -S '' -- $found || _files
}
compdef _efflaunch efflaunch
"""
_FISH = """\
# fish: efflaunch completion fish | source
complete -c efflaunch -a '(efflaunch completion words (commandline -cp)"." 2>/dev/null)'
"""
_CONFIGURED = ("train", "sweep", "plan", "profile", "resume", "simulate")
"""Commands that take key=value."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch completion`."""
    parser.add_argument("shell", choices=SHELLS)


def main(words: list[str]) -> int:
    """`completion SHELL` prints a script; `completion words LINE` prints candidates, one a line."""
    if words and words[0] == "words":
        print("\n".join(complete(" ".join(words[1:]).removesuffix("."))))
        return EXIT_DONE
    if words and words[0] in ("-h", "--help"):
        print("usage: efflaunch completion {bash,zsh,fish}\n")
        print('  bash  eval "$(efflaunch completion bash)"  in ~/.bashrc')
        print('  zsh   eval "$(efflaunch completion zsh)"   in ~/.zshrc, after compinit')
        print("  fish  efflaunch completion fish | source  in config.fish")
        return EXIT_DONE
    print(script(words[0] if words else ""), end="")
    return EXIT_DONE


def script(shell: str) -> str:
    """The script that turns completion on in `shell`; ConfigError for a shell we do not know."""
    scripts = dict(zip(SHELLS, (_BASH, _ZSH, _FISH), strict=True))
    if shell not in scripts:
        expected = f"one of {', '.join(SHELLS)}"
        raise ConfigError("efflaunch completion", found=repr(shell), expected=expected, hint="efflaunch completion bash")
    return Template(scripts[shell]).template


def complete(line: str) -> list[str]:
    """Candidates for the last word of a command line up to the cursor, whole words."""
    *before, current = line.split(" ")
    before = [word for word in before[1:] if word]
    if not before:
        return _matching([*COMMANDS, "--help", "--version", *_overrides(current, None)], current)
    command = before[0] if before[0] in COMMANDS else "train"
    if before[-1] == "--lengths":
        return _matching([*DISTRIBUTIONS], current)
    candidates = _options(command)
    if command in _CONFIGURED:
        candidates += _overrides(current, _config_dir(before))
    return _matching(candidates, current)


def _options(command: str) -> list[str]:
    """Options and words with a choice that the command takes, read from its own parser."""
    parser = CommandParser(command, "")
    command_module(command).add_arguments(parser)
    words = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
    return [*words, *(str(choice) for action in parser._actions if not action.option_strings for choice in action.choices or ())]


def _matching(candidates: list[str], current: str) -> list[str]:
    return [word for word in candidates if word.startswith(current)]


def _config_dir(words: list[str]) -> str | None:
    for first, second in zip(words, words[1:], strict=False):
        if first == "--config-dir" and Path(second).is_dir():
            return second
    return None


def _overrides(current: str, config_dir: str | None) -> list[str]:
    key, separator, _ = current.partition("=")
    if separator:
        return [f"{key}={value}" for value in _values(key.lstrip("+"), config_dir)]
    groups = [f"{group}=" for group in GROUPS]
    keys = [f"{name}=" for name, _, _ in walk_fields() if name != EXPERIMENT]
    return [f"+{EXPERIMENT}=", *groups, *(keys if "." in current else [f"{name}." for name in _parents(keys)])]


def _parents(keys: list[str]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in keys if "." in key))


def _values(key: str, config_dir: str | None) -> list[str]:
    if key in (*GROUPS, EXPERIMENT):
        return options(key, config_dir)
    return next((enum_values(hint) for name, hint, _ in walk_fields() if name == key), [])

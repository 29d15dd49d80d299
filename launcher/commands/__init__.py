"""What can be typed?

One module for each command of `efflaunch`: its arguments and its main; *_view.py print what a command found out. Imported by cli.py, at
the moment of use.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Protocol, cast

COMMANDS = {
    "train": "train, or resume the run of the same run.id (the default command)",
    "sweep": "one run for every combination of key=a,b values",
    "plan": "what a run would need: layout, memory per term, time; needs no GPU",
    "check-model": "whether a model is trained exactly as plain Hugging Face computes it; needs its config alone",
    "doctor": "what this machine and its software are fit for, and what is missing for the rest",
    "profile": "measure this machine for a configuration; planning then goes by what was measured",
    "rehearse": "an experiment in miniature on this machine: same code paths, tiny sizes",
    "resume": "resume a run directory, with changes if wanted",
    "status": "where a run stands",
    "logs": "what its ranks printed, the one that failed first last and in full",
    "cancel": "have a run save and stop",
    "checkpoints": "what a run has saved, where, and whether every byte is whole",
    "explain": "one step of a run: who held which sequences, why, and how far from the best",
    "simulate": "modelled step times of several planners, on clusters of any size",
    "evaluate": "the loss of a checkpoint or model on held-out corpora, at several context lengths",
    "compare": "runs side by side: loss, evaluations, speed, memory, settings that differ",
    "report": "one page of a run: curves, plans, memory, checkpoints, settings",
    "export": "write a checkpoint as a Hugging Face model directory",
    "import": "a DeepSpeed checkpoint as a Hugging Face model directory",
    "data": "data prepare: text, JSONL, Parquet -> indexed corpus",
    "completion": "print a script for tab completion: bash, zsh or fish",
}
"""First words and their lines of the help screen; each is a module of this folder, `-` as `_`."""


_MODULES = {"import": "import_checkpoint"}
"""Modules of commands that Python has the name of."""


class CommandModule(Protocol):
    """The protocol of a command's module in this folder."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def main(self, words: list[str]) -> int: ...


def command_module(name: str) -> CommandModule:
    """The module behind a first word, imported now: `efflaunch --help` needs none of them."""
    return cast(CommandModule, import_module(f".{_MODULES.get(name, name.replace('-', '_'))}", __package__))

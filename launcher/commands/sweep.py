"""`efflaunch sweep key=a,b ...`: one run for every combination of the values given."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError
from ...utils.names import as_identifier
from ..config.overrides import current_arguments
from ..config.paths import expand_home
from ..config.run_config import Backend, Config
from ..output import steady_output
from ..rundir.run_dir import make_run_id
from .arguments import CommandParser, add_dry_run, add_own_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run of a sweep: what it is called after, and its whole command line."""

    suffix: str
    overrides: tuple[str, ...]


DESCRIPTION = "One run for every combination of values, optim.lr=1e-3,1e-4 train.seed=0,1. Takes the arguments of train."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch sweep`."""
    text = "on SLURM or a Ray job server every run is a job, else they run in turn"
    parser.add_argument("overrides", nargs="+", metavar="key=a,b", help=text)
    add_own_files(parser)
    add_dry_run(parser)


def main(words: list[str]) -> int:
    """Run `efflaunch sweep` and return its exit code."""
    parser = CommandParser("sweep", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    return sweep(options.overrides, options.config_dir, dry_run=options.dry_run)


def sweep(overrides: list[str], config_dir: str | None, *, dry_run: bool) -> int:
    """Compose every point, then start them: on a scheduler all at once (launcher.slurm.array: as one job), here one after another.

    Returns 0, or the first exit code of a run that was not 0; a run that was stopped ends the sweep.
    """
    from .. import start
    from ..config.compose import compose

    points = expand(overrides)
    configs = [compose(list(point.overrides), config_dir) for point in points]
    base = configs[0].run.id or make_run_id(configs[0].experiment)
    # Long lists of values make long names: those are cut, and stay apart.
    names = [as_identifier(f"{base}-{point.suffix}") for point in points]
    configs = [replace(config, run=replace(config.run, id=name)) for name, config in zip(names, configs, strict=True)]
    if _is_array(configs):
        folder = Path(configs[0].run.root) / f"{base}-array"
        return start.show_array(configs, folder) if dry_run else start.launch_array(configs, folder)
    if dry_run:
        for config in configs:
            print(f"\n# {config.run.id}", flush=True)
            start.show_launch(config)
        return EXIT_DONE
    with steady_output():
        return _run_all(configs)


def _run_all(configs: Sequence[Config]) -> int:
    """The first exit code that is not 0."""
    from .. import start

    worst = EXIT_DONE
    for config in configs:
        print(f"\n# {config.run.id}", flush=True)
        code = start.launch(config)
        worst = worst or code
        if code == EXIT_PREEMPTED:
            break
    return worst


def _is_array(configs: Sequence[Config]) -> bool:
    """Return whether the sweep is one job array. ConfigError where its points disagree."""
    wanted = {config.launcher.backend is Backend.SLURM and config.launcher.slurm.array for config in configs}
    if len(wanted) > 1:
        hint = "launcher=slurm launcher.slurm.array=true, or neither"
        raise ConfigError("launcher.slurm.array", found="true for some points of the sweep", expected="it for all or none", hint=hint)
    return wanted == {True}


def expand(overrides: Sequence[str]) -> list[Point]:
    """The combinations of all values, the last key varying fastest. ConfigError where nothing has several."""
    # Names of runs keep the keys as typed: a sweep typed as before goes on with its runs.
    names = [text.partition("=")[0].lstrip("+").rpartition(".")[2] for text in overrides]
    overrides = current_arguments(list(overrides))
    choices = [[(text.partition("=")[0], value) for value in _values(text)] for text in overrides]
    if all(len(values) == 1 for values in choices):
        hint = "efflaunch sweep +experiment=quickstart optim.lr=1e-3,1e-4 train.seed=0,1"
        raise ConfigError("sweep", found="one value for every key", expected="several for one at least, as key=a,b", hint=hint)
    varied = [index for index, values in enumerate(choices) if len(values) > 1]
    points = []
    for combination in itertools.product(*choices):
        named = "-".join(f"{names[index]}-{combination[index][1]}" for index in varied)
        texts = tuple(f"{key}={value}" for key, value in combination)
        points.append(Point(suffix=as_identifier(named), overrides=texts))
    if len({point.suffix for point in points}) < len(points):
        points = [replace(point, suffix=f"{index}-{point.suffix}") for index, point in enumerate(points)]
    return points


def _values(argument: str) -> list[str]:
    """The values of one `key=a,b`, as every command reads them."""
    from ..config.compose import sweep_values

    key, _, value = argument.partition("=")
    value = expand_home(key.lstrip("+"), value)
    # What is no override at all is refused with every other point.
    several = sweep_values(f"{key}={value}") if key.strip("+~") else None
    return [value] if several is None else several

"""Start or resume a run: from a checked configuration to a backend."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ..errors import EXIT_DONE, ConfigError
from ..training.data.config import DataChanged
from ..utils.names import check_path
from ..utils.text import typed
from .checks import check_data, check_memory_plan, check_resumed, report_evaluation, report_model
from .config.overrides import parse_overrides
from .config.paths import absolute_paths
from .config.run_config import Backend, Config
from .config.schema import dump_config
from .output import steady_output
from .rundir.run_dir import RUN_FILE, make_run_id, place_of, read_run
from .rundir.state import ACTIVE, read_state


def train(overrides: list[str], config_dir: str | None, *, print_config: bool = False, dry_run: bool = False) -> int:
    """Train what the command line asks for; the run of a known run.id is resumed. Returns the job's exit code."""
    from .config.compose import compose

    config = compose(overrides, config_dir)
    if print_config:
        return show_config(config)
    if config.run.id is None:
        config = replace(config, run=replace(config.run, id=make_run_id(config.experiment)))
    return show_launch(config) if dry_run else launch(config)


def resume(run_dir: Path, overrides: list[str], config_dir: str | None, *, dry_run: bool = False) -> int:
    """Resume in `run_dir`, with `overrides` on top of its stored configuration."""
    from .config.compose import changed
    from .config.replaced_groups import replaced_lines

    config = read_run(run_dir).config
    # What was accepted was accepted for that start.
    config = replace(config, data=replace(config.data, changed=DataChanged.REFUSE))
    if overrides:
        before, parsed = config, parse_overrides(overrides, config_dir)
        config = changed(before, parsed, config_dir)
        # Standard output of a dry run is a script.
        for line in replaced_lines(before, config, parsed, config_dir):
            print(line, file=sys.stderr, flush=True)
    return show_launch(config, run_dir) if dry_run else launch(config, run_dir)


def show_config(config: Config) -> int:
    """Print the resolved configuration as YAML."""
    import yaml

    print(yaml.safe_dump(dump_config(config), sort_keys=False, default_flow_style=None, width=120), end="")
    return EXIT_DONE


def launch(config: Config, run_dir: Path | None = None, *, entry: str | None = None) -> int:
    """Hand `config` to its backend; returns the job's exit code, or 0 for what was handed to a scheduler.

    Everything that can be refused is refused before anything is written. `entry` replaces the training function.
    """
    from .backend import Launch
    from .backend_registry import launcher_of

    launcher, run_dir = launcher_of(config.launcher.backend), checked_place(config, run_dir)
    with steady_output():
        launcher.check(config)
        check_elsewhere(config, run_dir)
        check_memory_plan(config)
        check_mirror(config, run_dir)
        report_model(config)
        check_data(config)
        report_evaluation(config)
        changes = check_resumed(config, run_dir)
        if config.launcher.backend is not Backend.LOCAL:
            # Ranks say so where they start, which is elsewhere.
            print(*changes, sep="\n", end="\n" if changes else "", flush=True)
        return launcher.submit(Launch(config=config, run_dir=run_dir, entry=entry))


def launch_array(configs: list[Config], folder: Path, *, entry: str | None = None) -> int:
    """Hand all of `configs` to SLURM as one job array; `folder` is the array's own. Returns 0."""
    from .backend import Launch
    from .slurm.launcher import SlurmLauncher

    launcher = SlurmLauncher()
    launches = [Launch(config=config, run_dir=place_of(config), entry=entry) for config in configs]
    with steady_output():
        for launch in launches:
            launcher.check(launch.config)
            check_elsewhere(launch.config, launch.run_dir)
            check_memory_plan(launch.config)
            check_mirror(launch.config, launch.run_dir)
            check_data(launch.config)
            report_evaluation(launch.config)
            check_resumed(launch.config, launch.run_dir)
        report_model(configs[0])
        return launcher.submit_array(launches, folder)


def show_array(configs: list[Config], folder: Path) -> int:
    """Print what `launch_array` would hand over, and touch nothing."""
    from .backend import Launch
    from .slurm.launcher import SlurmLauncher

    launcher = SlurmLauncher()
    launches = [Launch(config=config, run_dir=place_of(config)) for config in configs]
    for launch in launches:
        launcher.check(launch.config)
    print(launcher.describe_array(launches, folder), end="")
    return EXIT_DONE


def show_launch(config: Config, run_dir: Path | None = None) -> int:
    """Print what `launch` would hand over, and touch nothing."""
    from .backend import Launch
    from .backend_registry import launcher_of

    launcher, run_dir = launcher_of(config.launcher.backend), checked_place(config, run_dir)
    launcher.check(config)
    print(launcher.describe(Launch(config=config, run_dir=run_dir)), end="")
    return EXIT_DONE


def checked_place(config: Config, run_dir: Path | None) -> Path:
    """The run directory, given or the configuration's. ConfigError where it, or the directory this is, is more than one line."""
    run_dir = run_dir or place_of(config)
    check_path("run directory", run_dir)
    check_path("current directory", Path.cwd())
    return run_dir


def check_elsewhere(config: Config, run_dir: Path) -> None:
    """ConfigError where the run waits or runs under another backend, which has its own ways to refuse a second start."""
    from .backend_registry import launcher_of

    try:
        run_state = read_state(run_dir) if (run_dir / RUN_FILE).is_file() else None
    except ConfigError:
        # Set aside under the run's lock, before anything is written.
        return
    if run_state is None or run_state.state not in ACTIVE:
        return
    backend = read_run(run_dir).config.launcher.backend
    if backend is config.launcher.backend:
        return
    standing = launcher_of(backend).status(run_dir, run_state)
    if standing.state in ACTIVE:
        raise ConfigError(
            str(run_dir),
            found=f"the run {standing.state} under launcher={backend.value}: {standing.detail or run_state.host}",
            expected="one start of a run at a time",
            hint=f"{typed('cancel', run_dir)}, where that launcher is; or another run.id",
        )


def check_mirror(config: Config, run_dir: Path) -> None:
    """CheckpointError where the second place cannot be the run's; on other machines nodes and ranks try to write there."""
    mirror = absolute_paths(config).checkpoint.mirror
    if mirror is not None:
        from ..checkpoint.files import FOLDER
        from ..checkpoint.tier import check_place, reach

        (reach if config.launcher.backend is Backend.LOCAL else check_place)(mirror, run_dir / FOLDER)

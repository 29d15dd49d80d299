"""Start a run, or go on with one: from a checked configuration to a backend."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError
from .config import Config
from .metrics_file import MetricsFollower
from .overrides import Override, parse_overrides
from .progress import Progress, summary_lines
from .rundir import RUN_FILE, make_run_id, read_run
from .schema import dump_config, load_config
from .sizes import settle_nodes
from .state import ACTIVE, read_state


def train(overrides: list[str], config_dir: str | None, *, print_config: bool = False, dry_run: bool = False) -> int:
    """Train what the command line asks for; a known run.id goes on. Returns the job's exit code."""
    from .compose import compose

    config = compose(overrides, config_dir)
    if print_config:
        return show_config(config)
    if config.run.id is None:
        config = replace(config, run=replace(config.run, id=make_run_id(config.experiment)))
    return show_launch(config) if dry_run else launch(config)


def resume(run_dir: Path, overrides: list[str], config_dir: str | None, *, dry_run: bool = False) -> int:
    """Go on in `run_dir`, with `overrides` on top of its stored configuration."""
    config = read_run(run_dir).config
    if overrides:
        config = changed(config, parse_overrides(overrides, config_dir), config_dir)
    return show_launch(config, run_dir) if dry_run else launch(config, run_dir)


def changed(config: Config, overrides: list[Override], config_dir: str | None) -> Config:
    """`config` with group options and values replaced, checked again."""
    import yaml

    from .compose import check_config, compose_group

    data = dump_config(config)
    for item in overrides:
        if item.key in ("experiment", "run.id", "run.root"):
            raise ConfigError(
                item.key, found="a change of it", expected="the run's own", hint="start another run: efflaunch +experiment=NAME"
            )
        if item.is_group:
            data[item.key] = compose_group(item.key, item.value, config_dir)
        else:
            # YAML reads 2:4 as minutes and seconds.
            _set(data, item.key, item.value if item.key == "launcher.nodes" else yaml.safe_load(item.value))
    result = settle_nodes(load_config(data), [item.key for item in overrides])
    check_config(result)
    return result


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = data[parent] = {}
        data = inner
    data[leaf] = value


def show_config(config: Config) -> int:
    """Print the resolved configuration as YAML."""
    import yaml

    print(yaml.safe_dump(dump_config(config), sort_keys=False, default_flow_style=None, width=120), end="")
    return EXIT_DONE


def launch(config: Config, run_dir: Path | None = None, *, entry: str | None = None) -> int:
    """Hand `config` to its backend; returns the job's exit code, or 0 for what was handed to a scheduler.

    Everything that can be refused is refused before anything is written. `entry` replaces the training function.
    """
    from .backends import Launch, launcher_of

    launcher, run_dir = launcher_of(config.launcher.backend), run_dir or place_of(config)
    launcher.check(config)
    check_elsewhere(config, run_dir)
    check_memory_plan(config)
    check_data(config)
    return launcher.submit(Launch(config=config, run_dir=run_dir, entry=entry))


def launch_array(configs: list[Config], folder: Path, *, entry: str | None = None) -> int:
    """Hand all of `configs` to SLURM as one job array; `folder` is the array's own. Returns 0."""
    from .backends import Launch
    from .backends.slurm import SlurmLauncher

    launcher = SlurmLauncher()
    for config in configs:
        launcher.check(config)
        check_elsewhere(config, place_of(config))
        check_memory_plan(config)
        check_data(config)
    return launcher.submit_array([Launch(config=config, run_dir=place_of(config), entry=entry) for config in configs], folder)


def show_array(configs: list[Config], folder: Path) -> int:
    """Print what `launch_array` would hand over, and touch nothing."""
    from .backends import Launch
    from .backends.slurm import SlurmLauncher

    launcher = SlurmLauncher()
    for config in configs:
        launcher.check(config)
    print(launcher.describe_array([Launch(config=config, run_dir=place_of(config)) for config in configs], folder), end="")
    return EXIT_DONE


def show_launch(config: Config, run_dir: Path | None = None) -> int:
    """Print what `launch` would hand over, and touch nothing."""
    from .backends import Launch, launcher_of

    launcher = launcher_of(config.launcher.backend)
    launcher.check(config)
    print(launcher.describe(Launch(config=config, run_dir=run_dir or place_of(config))), end="")
    return EXIT_DONE


def place_of(config: Config) -> Path:
    """The run directory."""
    assert config.run.id is not None, "made before launching"
    return Path(config.run.root) / config.run.id


def check_elsewhere(config: Config, run_dir: Path) -> None:
    """ConfigError where the run waits or runs under another backend, which has its own ways to refuse a second start."""
    from .backends import launcher_of

    try:
        known = read_state(run_dir) if (run_dir / RUN_FILE).is_file() else None
    except ConfigError:
        # Set aside under the run's lock, before anything is written.
        return
    if known is None or known.state not in ACTIVE:
        return
    backend = read_run(run_dir).config.launcher.backend
    if backend is config.launcher.backend:
        return
    standing = launcher_of(backend).status(run_dir, known)
    if standing.state in ACTIVE:
        raise ConfigError(
            str(run_dir),
            found=f"the run {standing.state} under launcher={backend.value}: {standing.detail or known.host}",
            expected="one start of a run at a time",
            hint=f"efflaunch cancel {run_dir}, where that launcher is; or another run.id",
        )


def check_memory_plan(config: Config) -> None:
    """PlanError where memory is to be solved and nothing fits, or a given policy is over a given host budget.

    A given policy that does not fit otherwise may run: the ledger is an upper bound.
    """
    from ..memory.advice import check_budget, check_fits
    from .plan_command import plan

    if config.memory.solve or config.memory.host_budget is not None:
        ledger = plan(config)
        check_fits(ledger)
        check_budget(ledger)


def check_data(config: Config) -> None:
    """DataError where the corpora cannot be trained on. A built-in corpus is made here, where one can say so."""
    from ..training.data.source import check_corpora, open_data
    from ..training.spec import model_spec

    vocab_size = model_spec(config.model).vocab_size
    if config.data.builtin is None:
        check_corpora(config.data, vocab_size, config.train.objective)
        return
    print(f"data: {config.data.builtin}, made once for this machine, in less than a minute", flush=True)
    print(f"data: {open_data(config.data, config.train.seed, vocab_size, config.train.objective).summary()}", flush=True)


def report_end(run_dir: Path, code: int) -> None:
    """Say how it ended and what to type next; the error of a failed run comes last and in full, on stderr."""
    progress = Progress().apply(MetricsFollower(run_dir).read())
    titles = {EXIT_DONE: "done", EXIT_PREEMPTED: "stopped and saved"}
    state = read_state(run_dir)
    reason = state.attempts[-1].decision if state and state.attempts else ""
    rows = [*summary_lines(progress), ("run", str(run_dir)), *_next_commands(run_dir, code, progress)]
    print(f"\n{titles.get(code, f'failed: {reason}')}")
    for name, value in rows:
        print(f"  {name:<12}{value}")
    sys.stdout.flush()
    if code not in titles:
        print_failure(run_dir)


def _next_commands(run_dir: Path, code: int, progress: Progress) -> list[tuple[str, str]]:
    more = f" train.steps={2 * progress.steps}" if code == EXIT_DONE and progress.steps else ""
    rows = [("go on", f"efflaunch resume {run_dir}{more}"), ("look", f"efflaunch status {run_dir}")]
    if progress.checkpoint is not None:
        rows.append(("export", f"efflaunch export {run_dir} OUT"))
    return rows


def print_failure(run_dir: Path) -> None:
    """The first failure of a run, in full, on stderr."""
    state = read_state(run_dir)
    failure = state.failure if state else None
    if failure is None:
        return
    if failure.is_user_error:
        print(f"\nefflaunch: {failure.message}", file=sys.stderr)
        return
    print(f"\nfirst failure: {failure.message}\n(log: {run_dir / failure.log})", file=sys.stderr)
    if failure.traceback:
        print(failure.traceback, file=sys.stderr)

"""The entry point of a job: `python -m efflaunch.launcher.ray.driver RUN_DIR --work-dir DIR`, in a directory with run.yaml.

The exit code is efflaunch's: 0, 75, 93 or 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import FrameType

from ...errors import ConfigError, EfflaunchError
from ...utils.atomic_files import file_errors_named
from ..agent.signals import on_stop_signals
from ..output import lenient_file, lenient_output
from ..rundir.run_dir import HASH_FILE, keep_private, read_run
from .attempts import Driver
from .cluster import joined
from .files import only_driver, output_file, read_submission
from .request import FOLDER


def main(arguments: list[str]) -> int:
    """Run the job to its end."""
    parser = argparse.ArgumentParser(prog="efflaunch.launcher.ray.driver")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--entry", help="training function as module:function")
    options = parser.parse_args(arguments)
    lenient_output()
    try:
        with file_errors_named():
            return _drive(options)
    except EfflaunchError as error:
        print(f"efflaunch: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _drive(options: argparse.Namespace) -> int:
    check_shared(options.run_dir, Path.cwd())
    keep_private(read_run(options.run_dir).config.run.private)
    submission = read_submission(options.run_dir)
    assert submission is not None, "written before the job was submitted"
    with only_driver(options.run_dir), joined(), lenient_file(output_file(options.run_dir, submission.job)) as keep:

        def say(line: str) -> None:
            print(line, flush=True)
            keep(line)

        driver = Driver(options.run_dir, job=submission.job, entry=options.entry, work_dir=options.work_dir, say=say, tick=lambda: None)
        take_stops(driver)
        return driver.run()


def check_shared(run_dir: Path, shipped: Path) -> None:
    """ConfigError where this machine does not see the run directory that the job was submitted with."""
    mine, sent = run_dir / HASH_FILE, shipped / HASH_FILE
    problem = ""
    try:
        if mine.read_text() != sent.read_text():
            problem = "another run.yaml than the one that was submitted"
        probe = run_dir / FOLDER / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        problem = f"{error.strerror}: {error.filename}"
    if problem:
        where = f"run directory {run_dir}, where the job's driver runs"
        hint = "run.root=DIR on storage that this machine and every node of the cluster share"
        raise ConfigError(where, found=problem, expected="the directory of the machine that submitted", hint=hint)


def take_stops(driver: Driver) -> None:
    """Install the stop handlers; called after ray.init, which takes SIGTERM for itself."""

    def stop(number: int, frame: FrameType | None) -> None:
        driver.stop()

    on_stop_signals(stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

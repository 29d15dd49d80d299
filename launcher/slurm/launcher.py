"""Run as a SLURM batch job: writes its script, hands it to sbatch, and asks SLURM about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ...errors import EXIT_DONE, ConfigError, EfflaunchError
from ...utils.atomic_files import write_atomic
from ...utils.text import typed
from ..backend import Launch, Standing, announce, grace_note, job_exists, note_refused, print_submitted
from ..config.run_config import Config
from ..elastic_nodes import usable
from ..rundir import state
from ..rundir.lock import holding
from ..rundir.run_dir import RUN_FILE, make_run_dir
from ..rundir.state import RunState
from . import control
from .array import render_array
from .files import cancel_file, submitted_job, write_submission
from .job import queue
from .script import JOB_DIR, BatchJob, check_batch, render_sbatch

SCRIPT = "job.sbatch"
_ENDS = {"CANCELLED": "cancelled", "COMPLETED": state.DONE}


class SlurmLauncher:
    """See backends.Launcher."""

    def check(self, config: Config) -> None:
        check_batch(config)

    def describe(self, launch: Launch) -> str:
        return render_sbatch(batch_job(launch), template_text())

    def submit(self, launch: Launch) -> int:
        control.check_slurm()
        run_dir = launch.run_dir.resolve()
        with ExitStack() as stack:
            self._queue(launch, stack)
            text = self.describe(launch)
            job = _hand_over(run_dir / JOB_DIR / SCRIPT, text, [run_dir])
            write_submission(run_dir, job)
        print_submitted(f"job {job} of SLURM submitted", launch)
        return EXIT_DONE

    def _queue(self, launch: Launch, stack: ExitStack) -> None:
        """Make the run directory ready for a job, and keep others out of it until `held` is closed."""
        run_dir = launch.run_dir.resolve()
        is_resumed = (run_dir / RUN_FILE).is_file()
        _check_idle(run_dir)
        make_run_dir(run_dir, private=launch.config.run.private)
        stack.enter_context(holding(run_dir))
        # Again, now that nobody else can submit: two may have looked at once.
        _check_idle(run_dir)
        announce(launch.run_dir, is_resumed, *queue(run_dir, launch.config))

    def describe_array(self, launches: Sequence[Launch], folder: Path) -> str:
        """Exactly what submit_array would hand over. Touches nothing."""
        return render_array([batch_job(launch) for launch in launches], folder.resolve(), template_text())

    def submit_array(self, launches: Sequence[Launch], folder: Path) -> int:
        """All of `launches` as one job array; `folder`: of the array as a whole. Each index is a run like any other from then on."""
        control.check_slurm()
        text = self.describe_array(launches, folder)
        run_dirs = [launch.run_dir.resolve() for launch in launches]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with ExitStack() as stack:
            for launch in launches:
                self._queue(launch, stack)
            job = _hand_over(folder / SCRIPT, text, run_dirs)
            for index, run_dir in enumerate(run_dirs):
                write_submission(run_dir, f"{job}_{index}")
        print(f"job array {job} of SLURM submitted: {len(launches)} runs, {job}_0 to {job}_{len(launches) - 1}")
        for note in filter(None, map(grace_note, launches[:1])):
            print(f"  {note}")
        print(f"  look        {typed('status', launches[0].run_dir)}, and so on")
        print(f"  stop all    scancel {job}")
        return EXIT_DONE

    def status(self, run_dir: Path, run_state: RunState) -> Standing:
        job = submitted_job(run_dir)
        if job is None:
            return Standing(state=run_state.state)
        try:
            facts = control.find_job(job)
        except EfflaunchError as error:
            return Standing(state=run_state.state, detail=f"job {job}, {error}", job=job)
        return reconcile(run_state, job, facts)

    def cancel(self, run_dir: Path, run_state: RunState, *, now: bool) -> str:
        job = submitted_job(run_dir)
        facts = control.find_job(job) if job is not None else None
        if job is None or facts is None or not facts.is_alive:
            raise ConfigError(str(run_dir), found="no job of it in SLURM", expected="one that waits or runs", hint=typed("status", run_dir))
        # Before the signal: `job settle` must not requeue what it finds stopped.
        cancel_file(run_dir, job).touch()
        if now or facts.state in control.WAITING:
            control.end_job(job)
            return f"job {job} taken from the queue" if facts.state in control.WAITING else f"job {job} ended; its last checkpoint stands"
        control.signal_steps(job, "USR2")
        return f"job {job} is told to finish its step, save and stop"

    def logs(self, run_dir: Path) -> list[Path]:
        return sorted((run_dir / JOB_DIR).glob("*.out"), key=lambda path: path.stat().st_mtime)


def batch_job(launch: Launch) -> BatchJob:
    """Build the submission for render_sbatch, with this process's directory and Python."""
    python = launch.config.launcher.slurm.python or sys.executable
    return BatchJob(
        config=launch.config,
        run_dir=launch.run_dir.resolve(),
        work_dir=Path.cwd(),
        python=python,
        entry=launch.entry,
        nodes=usable(launch.config),
    )


def _hand_over(script: Path, text: str, run_dirs: Sequence[Path]) -> str:
    """The job's number; where SLURM refuses it, every run knows."""
    write_atomic(script, text)
    try:
        return control.submit(script)
    except EfflaunchError:
        for run_dir in run_dirs:
            note_refused(run_dir)
        raise


def template_text() -> str:
    """slurm/efflaunch.sbatch, of which every job has the second part."""
    return (Path(__file__).resolve().parent.parent.parent / "slurm" / "efflaunch.sbatch").read_text()


def reconcile(run_state: RunState, job: str, facts: control.JobFacts | None) -> Standing:
    """The run's state by its own file and by SLURM, which knows better whether anything lives. Pure."""
    if facts is None:
        gone = run_state.state in state.ACTIVE
        return Standing(state="died" if gone else run_state.state, detail=f"job {job}, which SLURM has forgotten", job=job)
    parts = [f"job {job} {facts.state}"]
    parts += [f"({facts.reason})"] if facts.reason and facts.state in control.WAITING else []
    parts += [f"on {facts.nodes}"] if facts.nodes and facts.state in control.RUNNING else []
    parts += [f"requeued {facts.restarts} times"] if facts.restarts else []
    detail = " ".join(parts)
    if facts.state in control.WAITING:
        return Standing(state=state.QUEUED, detail=detail, job=job)
    if run_state.state not in state.ACTIVE or facts.is_alive:
        return Standing(state=run_state.state, detail=detail, job=job)
    return Standing(state=_ENDS.get(facts.state, "died"), detail=detail, job=job)


def _check_idle(run_dir: Path) -> None:
    """ConfigError where a job of this run already waits or runs."""
    job = submitted_job(run_dir)
    facts = control.find_job(job) if job is not None else None
    if facts is not None and facts.is_alive:
        raise job_exists(run_dir, f"job {job}, {facts.state} since {facts.start}")

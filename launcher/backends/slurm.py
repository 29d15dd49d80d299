"""Run as a SLURM batch job: writes its script, hands it to sbatch, and asks SLURM about it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ...durable import write_atomic
from ...errors import EXIT_DONE, ConfigError, EfflaunchError
from .. import state
from ..config import Config
from ..metrics_file import MetricsFollower
from ..rundir import RUN_FILE, holding, make_run_dir
from ..slurm import control
from ..slurm.files import cancel_file, submitted_job, write_submission
from ..slurm.job import queue
from ..slurm.script import JOB_DIR, BatchJob, check_batch, render_sbatch
from ..state import RunState, read_state
from . import Launch, Standing, announce, grace_note

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
        goes_on = (run_dir / RUN_FILE).is_file()
        _check_idle(run_dir)
        make_run_dir(run_dir, private=launch.config.run.private)
        with holding(run_dir):
            announce(launch.run_dir, goes_on, *queue(run_dir, launch.config))
            job = self._hand_over(launch, run_dir)
        print(f"job {job} of SLURM submitted")
        note = grace_note(MetricsFollower(run_dir).read(), launch.config.launcher.grace_s)
        if note:
            print(f"  {note}")
        for name, command in (("look", "status"), ("logs", "logs"), ("stop", "cancel")):
            print(f"  {name:<12}efflaunch {command} {launch.run_dir}")
        return EXIT_DONE

    def _hand_over(self, launch: Launch, run_dir: Path) -> int:
        script = run_dir / JOB_DIR / SCRIPT
        write_atomic(script, self.describe(launch))
        try:
            job = control.submit(script)
        except EfflaunchError:
            _note_refused(run_dir)
            raise
        write_submission(run_dir, job)
        return job

    def status(self, run_dir: Path, known: RunState) -> Standing:
        job = submitted_job(run_dir)
        if job is None:
            return Standing(state=known.state)
        try:
            facts = control.find_job(job)
        except EfflaunchError as error:
            return Standing(state=known.state, detail=f"job {job}, {error}", job=str(job))
        return reconcile(known, job, facts)

    def cancel(self, run_dir: Path, known: RunState, *, now: bool) -> str:
        job = submitted_job(run_dir)
        facts = control.find_job(job) if job is not None else None
        if job is None or facts is None or not facts.is_alive:
            raise ConfigError(
                str(run_dir), found="no job of it in SLURM", expected="one that waits or runs", hint=f"efflaunch status {run_dir}"
            )
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
    """The submission as render_sbatch wants it, with this process's directory and Python."""
    python = launch.config.launcher.slurm.python or sys.executable
    return BatchJob(config=launch.config, run_dir=launch.run_dir.resolve(), work_dir=Path.cwd(), python=python, entry=launch.entry)


def template_text() -> str:
    """slurm/efflaunch.sbatch, of which every job has the second part."""
    return (Path(__file__).resolve().parent.parent.parent / "slurm" / "efflaunch.sbatch").read_text()


def reconcile(known: RunState, job: int, facts: control.JobFacts | None) -> Standing:
    """The run's state by its own file and by SLURM, which knows better whether anything lives. Pure."""
    if facts is None:
        gone = known.state in state.ACTIVE
        return Standing(state="died" if gone else known.state, detail=f"job {job}, which SLURM has forgotten", job=str(job))
    parts = [f"job {job} {facts.state}"]
    parts += [f"({facts.reason})"] if facts.reason and facts.state in control.WAITING else []
    parts += [f"on {facts.nodes}"] if facts.nodes and facts.state in control.RUNNING else []
    parts += [f"requeued {facts.restarts} times"] if facts.restarts else []
    detail = " ".join(parts)
    if facts.state in control.WAITING:
        return Standing(state=state.QUEUED, detail=detail, job=str(job))
    if known.state not in state.ACTIVE or facts.is_alive:
        return Standing(state=known.state, detail=detail, job=str(job))
    return Standing(state=_ENDS.get(facts.state, "died"), detail=detail, job=str(job))


def _check_idle(run_dir: Path) -> None:
    """ConfigError where a job of this run already waits or runs."""
    job = submitted_job(run_dir)
    facts = control.find_job(job) if job is not None else None
    if facts is not None and facts.is_alive:
        raise ConfigError(
            str(run_dir),
            found=f"job {job}, {facts.state} since {facts.start}",
            expected="one job per run directory",
            hint=f"efflaunch cancel {run_dir} first, or another run.id",
        )


def _note_refused(run_dir: Path) -> None:
    known = read_state(run_dir)
    assert known is not None, "just written"
    state.write_state(run_dir, replace(known, state=state.FAILED))

"""What the parts of a job tell each other: small files below RUN_DIR/slurm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..env import SlurmPlace
from ..files import write_json
from .script import JOB_DIR


def write_submission(run_dir: Path, job: int) -> None:
    """Note the job that was submitted last."""
    write_json(run_dir / JOB_DIR / "job.json", {"job": job})


def submitted_job(run_dir: Path) -> int | None:
    """The job that was submitted last; None where none was."""
    try:
        data: dict[str, Any] = json.loads((run_dir / JOB_DIR / "job.json").read_text())
    except FileNotFoundError:
        return None
    return int(data["job"])


def cancel_file(run_dir: Path, job: int) -> Path:
    """There where a person told the job to stop for good."""
    return run_dir / JOB_DIR / f"cancelled-{job}"


def stop_file(run_dir: Path, job: int, restart: int) -> Path:
    """There where a stop signal arrived while no agent ran that could take it."""
    return run_dir / JOB_DIR / f"stop-{job}-{restart}"


def stop_asked(run_dir: Path, place: SlurmPlace) -> bool:
    """Whether this life of the job is to end before it starts anything."""
    return cancel_file(run_dir, place.job).exists() or stop_file(run_dir, place.job, place.restart).exists()


def forget_stops(run_dir: Path) -> None:
    """Remove what earlier jobs were told: a scheduler that starts anew counts from 1 again."""
    for pattern in ("cancelled-*", "stop-*", "seen-*"):
        for path in (run_dir / JOB_DIR).glob(pattern):
            path.unlink(missing_ok=True)

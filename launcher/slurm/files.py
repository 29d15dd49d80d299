"""Small files below RUN_DIR/slurm by which the parts of a job exchange messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..env import SlurmPlace
from ..rundir.small_files import write_json
from .script import JOB_DIR


def write_submission(run_dir: Path, job: str) -> None:
    """Note the job that was submitted last, 100 or, of an array, 100_2."""
    write_json(run_dir / JOB_DIR / "job.json", {"job": job})


def submitted_job(run_dir: Path) -> str | None:
    """The job that was submitted last; None where none was."""
    path = run_dir / JOB_DIR / "job.json"
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        job = data["job"]
        if not isinstance(job, str) or re.fullmatch(r"\d+(_\d+)?", job) is None:
            raise ValueError(f"the job {job!r}")
        return job
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        hint = f"squeue --me finds the job; rm {path} where there is none any more"
        raise ConfigError(str(path), found=str(error), expected="the job that was submitted last", hint=hint) from error


def cancel_file(run_dir: Path, job: str) -> Path:
    """Return the file that exists once a person has asked the job to stop for good."""
    return run_dir / JOB_DIR / f"cancelled-{job}"


def stop_file(run_dir: Path, job: str, restart: int) -> Path:
    """Return the file that exists once a stop signal arrived while no agent ran that could take it."""
    return run_dir / JOB_DIR / f"stop-{job}-{restart}"


def stop_asked(run_dir: Path, place: SlurmPlace) -> bool:
    """Return whether this life of the job is to end before it starts anything."""
    return cancel_file(run_dir, place.word).exists() or stop_file(run_dir, place.word, place.restart).exists()


def exclude_file(run_dir: Path) -> Path:
    """Names the nodes that the job is not to get again, for the batch script to hand to SLURM."""
    return run_dir / JOB_DIR / "exclude"


def forget_stops(run_dir: Path) -> None:
    """Remove messages to earlier jobs: a scheduler that was set up again counts jobs from 1."""
    for pattern in ("cancelled-*", "stop-*", "seen-*", "exclude"):
        for path in (run_dir / JOB_DIR).glob(pattern):
            path.unlink(missing_ok=True)

"""A sweep as one job array: a script whose every index is one run. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from .script import JOB_DIR, BatchJob, assemble, output_option, sbatch_options

_OWN = ("--job-name=", "--output=")
"""Options that differ between the points of any sweep."""


def render_array(jobs: Sequence[BatchJob], folder: Path, template: str) -> str:
    """The script of all of `jobs`, in order; ConfigError where SLURM would have to treat them differently.

    `folder`: of the array as a whole; there stands what is printed before an index knows its run directory.
    """
    first = jobs[0]
    for job in jobs[1:]:
        _check_same(first, job)
    limit = first.config.launcher.slurm.array_limit
    if limit is not None and limit < 1:
        raise ConfigError("launcher.slurm.array_limit", found=str(limit), expected="1 or more", hint="launcher.slurm.array_limit=null")
    array = f"--array=0-{len(jobs) - 1}" + ("" if limit is None else f"%{limit}")
    shared = [option for option in sbatch_options(first) if not option.startswith(_OWN)]
    options = [f"--job-name={shlex.quote(f'efflaunch-{folder.name}')}", array, *shared, output_option(folder, "%A_%a")]
    target = [
        "run_dirs=(",
        *(f"  {shlex.quote(str(job.run_dir))}" for job in jobs),
        ")",
        "run_dir=${run_dirs[$SLURM_ARRAY_TASK_ID]}",
        f'exec >>"$run_dir/{JOB_DIR}/$SLURM_JOB_ID.out" 2>&1',
    ]
    return assemble(first, options, target, template)


def _check_same(first: BatchJob, other: BatchJob) -> None:
    mine, its = (dict(_facts(job)) for job in (first, other))
    apart = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
    if apart:
        one, another = (f"{facts.get(apart[0], 'not given')} for {job.run_dir.name}" for facts, job in ((mine, first), (its, other)))
        raise ConfigError(
            "launcher.slurm.array",
            found=f"{apart[0]} {one} and {another}",
            expected="points that differ in what they train, not in what they ask of SLURM",
            hint="launcher.slurm.array=false, or a sweep for each",
        )


def _facts(job: BatchJob) -> list[tuple[str, str]]:
    options = [option for option in sbatch_options(job) if not option.startswith(_OWN)]
    site = job.config.cluster.slurm
    named = [(option.partition("=")[0], option.partition("=")[2] or "given") for option in options if option not in site.sbatch]
    return [
        *named,
        ("cluster.slurm.sbatch", repr(site.sbatch)),
        ("cluster.slurm.prologue", repr(site.prologue)),
        ("cluster.slurm.srun", repr(site.srun)),
        ("launcher.slurm.python", job.python),
        ("launcher.slurm.array_limit", str(job.config.launcher.slurm.array_limit)),
    ]

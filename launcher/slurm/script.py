"""The batch script of a run, as text. Pure."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...cluster.config import Device
from ...errors import ConfigError
from ...utils.names import check_text
from ..config.node_range import NodeRange, node_range
from ..config.run_config import Config

MARK = "# --- The same in every job from here on."
SIGNAL_MARGIN_S = 15
"""Beyond launcher.grace_s: for ranks that had to be killed, and for the word that they were."""
JOB_DIR = "slurm"
"""Folder of SLURM's part of a run, inside the run directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchJob:
    """One submission to SLURM: configuration, directories, nodes."""

    config: Config
    run_dir: Path
    """Absolute, and the same on every node."""
    work_dir: Path
    """Directory in which the job runs: relative paths of the configuration start there."""
    python: str
    nodes: NodeRange | None = None
    """Part of the range launcher.nodes that can be used; None: all of it."""
    entry: str | None = None
    """Training function in place of the real one, as module:function."""


def render_sbatch(job: BatchJob, template: str) -> str:
    """The whole script: a head for this run, then what `template` (slurm/efflaunch.sbatch) has from its mark on."""
    return assemble(job, list(sbatch_options(job)), [f"run_dir={shlex.quote(str(job.run_dir))}"], template)


def assemble(job: BatchJob, options: Sequence[str], target: Sequence[str], template: str) -> str:
    """A script of these #SBATCH options; the lines of `target` set its run directory."""
    mark = template.index(MARK)
    for line in (*options, *target, job.python, str(job.work_dir), job.entry or ""):
        # The one way into the script: a line more would be a command more, wherever its text comes from.
        check_text("batch script", line)
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    prologue = job.config.cluster.slurm.prologue
    lines += [*prologue, ""] if prologue else []
    entry = ["--entry", job.entry] if job.entry else []
    lines += [
        f"python={shlex.quote(job.python)}",
        *target,
        f"srun_options=({shlex.join(job.config.cluster.slurm.srun)})",
        f"agent_options=({shlex.join(entry)})",
        "",
    ]
    return "\n".join(lines) + "\n" + template[mark:]


def sbatch_options(job: BatchJob) -> Iterator[str]:
    """Yield the option behind each #SBATCH, in order."""
    config, site, slurm = job.config, job.config.cluster.slurm, job.config.launcher.slurm
    yield f"--job-name={_word(f'efflaunch-{job.run_dir.name}')}"
    wanted = job.nodes or node_range(config)
    if wanted.least == wanted.most:
        yield f"--nodes={wanted}"
        yield "--ntasks-per-node=1"
    else:
        # With a number of tasks SLURM gives no more nodes than the least; srun says one task on each.
        yield f"--nodes={wanted.least}-{wanted.most}"
        # A node that goes down does not end the job: it continues on the others, where the batch script still runs.
        yield "--no-kill"
    if site.gres is not None:
        yield f"--gres={_word(site.gres)}"
    elif config.cluster.device is Device.CUDA:
        yield f"--gpus-per-node={config.cluster.ranks_per_node}"
    asked: dict[str, object] = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "mem": site.mem,
        "cpus-per-task": site.cpus_per_node,
        "time": None if site.time_s is None else format_time(site.time_s),
        "exclude": ",".join(slurm.exclude) or None,
        "dependency": slurm.after,
    }
    for option, value in asked.items():
        if value is not None:
            yield f"--{option}={_word(str(value))}"
    if slurm.after is not None:
        # Else a job whose condition can never hold waits for ever.
        yield "--kill-on-invalid-dep=yes"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield "--open-mode=append"
    yield f"--signal=USR2@{signal_lead_s(config)}"
    yield f"--chdir={_word(str(job.work_dir))}"
    yield output_option(job.run_dir / JOB_DIR, "%j")
    yield from site.sbatch


def output_option(directory: Path, name: str) -> str:
    """--output for what the script prints; `name` may hold SLURM's placeholders."""
    # SLURM reads % as the start of one.
    return f"--output={_word(str(directory).replace('%', '%%') + f'/{name}.out')}"


def _word(text: str) -> str:
    return shlex.quote(text)


def signal_lead_s(config: Config) -> int:
    """Seconds before the time limit at which SLURM has to send USR2."""
    return math.ceil(config.launcher.grace_s) + SIGNAL_MARGIN_S


def format_time(seconds: float) -> str:
    """Days-hours:minutes:seconds as sbatch reads them; SLURM counts whole minutes."""
    days, rest = divmod(math.ceil(seconds), 86400)
    return f"{days}-{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"


def check_batch(config: Config) -> None:
    """ConfigError where the options cannot make a job."""
    site = config.cluster.slurm
    for index, line in enumerate(site.sbatch):
        if not line.startswith("-") or "\n" in line:
            key = f"cluster.slurm.sbatch[{index}]"
            raise ConfigError(
                key, found=repr(line), expected="what follows #SBATCH", hint="""'cluster.slurm.sbatch=["--reservation=NAME"]'"""
            )
    if site.time_s is not None and site.time_s <= signal_lead_s(config):
        raise ConfigError(
            "cluster.slurm.time_s",
            found=f"{site.time_s:g} s",
            expected=f"more than {signal_lead_s(config)} s: launcher.grace_s, kept for saving, and {SIGNAL_MARGIN_S} s",
            hint="cluster.slurm.time_s=1h, or a smaller launcher.grace_s",
        )

"""SLURM's own commands, and what they print. No accounting database is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError, EfflaunchError

_TIMEOUT_S = 60
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "CONFIGURING")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFacts:
    """A job as SLURM sees it now."""

    job: int
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETED, TIMEOUT, ..."""
    reason: str
    nodes: str
    restarts: int
    start: str
    time_limit: str

    @property
    def is_alive(self) -> bool:
        """Waiting or running."""
        return self.state in WAITING or self.state in RUNNING


def has_slurm() -> bool:
    """Return whether this machine has SLURM's commands."""
    return shutil.which("sbatch") is not None


def check_slurm() -> None:
    """ConfigError where this machine cannot submit."""
    if not has_slurm():
        raise ConfigError(
            "launcher=slurm",
            found="no sbatch on PATH",
            expected="a machine that SLURM takes jobs from",
            hint="log in to one, or load SLURM's module; --dry-run prints the script anywhere",
        )


def controller_words() -> str:
    """Return SLURM's version and its controllers' states, as `slurm-wlm 22.05.8; slurmctld at head is UP`. ConfigError where none is up."""
    version, ping = _run("sinfo", "--version"), _run("scontrol", "ping")
    said = " ".join((ping.stdout.strip() or ping.stderr.strip().rpartition("\n")[2]).split())
    if ping.returncode or " UP" not in said:
        hint = "ask the site; --dry-run prints scripts without it"
        raise ConfigError("SLURM", found=said or f"exit code {ping.returncode}", expected="a controller that is up", hint=hint)
    return f"{version.stdout.strip()}; {said}"


def submit(script: Path) -> str:
    """The job's number; ConfigError with sbatch's own words where it refuses."""
    done = _run("sbatch", "--parsable", str(script))
    number = done.stdout.strip().partition(";")[0]
    if done.returncode or not number.isdecimal():
        said = " ".join((done.stderr or done.stdout).replace("sbatch: ", "").split()) or f"exit code {done.returncode}"
        hint = "cluster.slurm.partition=..., cluster.slurm.account=..., or whatever it asks for; --dry-run prints the script"
        raise ConfigError("sbatch", found=said, expected="the job to be accepted", hint=hint)
    return number


def find_job(job: str) -> JobFacts | None:
    """Ask SLURM for the facts of a job; None where it has forgotten it. EfflaunchError where SLURM does not answer."""
    done = _run("scontrol", "show", "job", "-o", job)
    if done.returncode == 0:
        return parse_job(done.stdout)
    if "Invalid job id" in done.stderr:
        return _remembered(job)
    raise EfflaunchError(f"SLURM does not answer: {' '.join(done.stderr.split())}")


def parse_job(line: str) -> JobFacts:
    """Parse one line of `scontrol show job -o`."""

    def value(name: str) -> str:
        match = re.search(rf"(?:^|\s){name}=(\S*)", line)
        return match[1] if match else ""

    return JobFacts(
        job=int(value("JobId")),
        state=value("JobState"),
        reason="" if value("Reason") == "None" else value("Reason"),
        nodes="" if value("NodeList") == "(null)" else value("NodeList"),
        restarts=int(value("Restarts") or 0),
        start=value("StartTime"),
        time_limit=value("TimeLimit"),
    )


def _remembered(job: str) -> JobFacts | None:
    """Ask the accounting database for the job; None where there is none."""
    if shutil.which("sacct") is None:
        return None
    done = _run("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,NodeList,Start,Timelimit")
    line = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    if not line or line[0].count("|") != 3:
        return None
    state, nodes, start, limit = line[0].split("|")
    return JobFacts(
        job=int(job.partition("_")[0]), state=state.partition(" ")[0], reason="", nodes=nodes, restarts=0, start=start, time_limit=limit
    )


def partition_nodes(partition: str) -> set[str] | None:
    """Return the partition's nodes by name, whatever they do now; None where SLURM's commands are missing, as in a container."""
    if not partition or shutil.which("sinfo") is None:
        return None
    done = _run("sinfo", "-h", "-N", "-p", partition, "-o", "%N")
    return set(done.stdout.split()) if done.returncode == 0 and done.stdout.strip() else None


def signal_steps(job: str, name: str) -> None:
    """Send a signal to every process of the job's steps, and not to its script."""
    _must("scancel", f"--signal={name}", job)


def end_job(job: str) -> None:
    """Take the job from the queue, or end it: SIGTERM, the site's KillWait, SIGKILL."""
    _must("scancel", job)


def _must(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        raise EfflaunchError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split())}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        hint = "a machine with SLURM's commands"
        raise ConfigError(command[0], found="no such command on PATH", expected="SLURM's commands", hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise EfflaunchError(f"SLURM does not answer: {' '.join(command)} took more than {_TIMEOUT_S} s") from error

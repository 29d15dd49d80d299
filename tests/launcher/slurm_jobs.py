"""Runs handed to a real SLURM (bench/clusters/slurm.py), for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from efflaunch.bench.clusters.slurm import SlurmCluster
from efflaunch.launcher.slurm.files import submitted_job
from efflaunch.tests.launcher.cluster_jobs import FAKE as FAKE_TRAINING
from efflaunch.tests.launcher.cluster_jobs import ClusterJob, run_efflaunch

FAKE = ("+experiment=quickstart", "cluster.ranks_per_node=2", "checkpoint.every_steps=5", "launcher=slurm", "cluster.num_nodes=2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass
class Job(ClusterJob):
    """One run handed to SLURM."""

    cluster: SlurmCluster

    @property
    def number(self) -> str:
        number = submitted_job(self.run_dir)
        assert number is not None
        return number

    def end(self) -> str:
        """SLURM's word for how it ended."""
        return self.cluster.wait_for(self.number, *ENDED)

    def has_ended(self) -> bool:
        return self.cluster.job_state(self.number) in ENDED

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run_dir / "slurm").glob("*.out")))


def efflaunch(
    cluster: SlurmCluster, place: Path, *words: str, script: Path | None = FAKE_TRAINING, expect: int = 0, **variables: str
) -> str:
    """What an efflaunch command prints; with the fake training function unless told otherwise."""
    return run_efflaunch(cluster.environment, place, *words, script=script, expect=expect, variables=variables)


def submit(cluster: SlurmCluster, place: Path, name: str, *words: str, mishaps: str = "", step_s: float = 0.02) -> Job:
    """A run of the fake training function on two nodes with two ranks each."""
    efflaunch(cluster, place, *FAKE, f"run.id={name}", *words, FAKE_TRAINING=mishaps, FAKE_STEP_S=str(step_s))
    return Job(place / "runs" / name, cluster)

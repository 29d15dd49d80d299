"""The SLURM of tests; benchmarks use the same."""

from __future__ import annotations

from efflaunch.bench.clusters.slurm import PROGRAMS, TIMEOUT_S, SlurmCluster, wait_until, why_not

__all__ = ["PROGRAMS", "TIMEOUT_S", "SlurmCluster", "wait_until", "why_not"]

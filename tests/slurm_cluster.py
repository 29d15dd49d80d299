"""The SLURM of tests; benchmarks use the same."""

from __future__ import annotations

from efflaunch.bench.clusters.slurm import PROGRAMS, SlurmCluster, why_not
from efflaunch.bench.clusters.spaces import TIMEOUT_S, wait_until

__all__ = ["PROGRAMS", "TIMEOUT_S", "SlurmCluster", "wait_until", "why_not"]

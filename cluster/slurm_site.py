"""Lists what a SLURM site asks of every job (cluster.slurm): plain data, kept with the cluster it describes.

The code that talks to SLURM is launcher/slurm/; batch scripts for people to copy are slurm/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..units import Seconds
from ..utils.ranges import LONG_S, Range


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmSite:
    """Requests that this cluster's SLURM makes of a job; nothing is asked for that is not given."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features a node must have, as `sbatch --constraint`."""
    gres: str | None = None
    """Generic resources of a node, as `gpu:h100:8`; None: --gpus-per-node=cluster.ranks_per_node on CUDA, nothing on CPU."""
    time_s: Seconds | None = None
    """Time limit of the job; None: the partition's own."""
    cpus_per_node: int | None = None
    """Cores of the one task a node runs; None: the site's default."""
    mem: str | None = None
    """Memory of a node, as `sbatch --mem`; None: not asked for, since some sites refuse it."""
    sbatch: list[str] = field(default_factory=list)
    """More lines of the script, each what follows `#SBATCH`."""
    prologue: list[str] = field(default_factory=list)
    """Shell lines ahead of everything: `module load cuda`, `source /shared/venv/bin/activate`."""
    srun: list[str] = field(default_factory=list)
    """More options of every srun, such as those that name a container."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "time_s": Range(60, LONG_S),
        "cpus_per_node": Range(1, 65_536),
    }

"""The launcher behind each value of `launcher=`."""

from __future__ import annotations

from .backend import Launcher
from .config.run_config import Backend


def launcher_of(backend: Backend) -> Launcher:
    """The module behind `launcher=...`."""
    if backend is Backend.SLURM:
        from .slurm import launcher as slurm

        return slurm.SlurmLauncher()
    if backend is Backend.RAY:
        from .ray import launcher as ray

        return ray.RayLauncher()
    from . import local

    return local.LocalLauncher()

"""Where the optimizer's numbers and their copies are and how long gradients live, in bytes a parameter; training/optimizers does it. Pure.

float32 weights and moments are 12 bytes a parameter, gradients 4 more where all of a step exist at one time: 16 on the device,
or 2 there (bfloat16 weights) and 12 on the host where layers are updated in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoint.config import CheckpointConfig
    from ..training.optimizers.config import OptimConfig

MOMENT_BYTES = {"float32": None, "bfloat16": 2.0, "8bit": 1.0 + 4.0 / 256}
"""Bytes of one number of one moment; 8bit: a code, and a float32 scale for 256 of them."""
STORED = {"adamw": 2.0, "muon": 2.0, "lion": 1.0, "adan": 4.0, "ademamix": 3.0, "nadam": 2.0, "radam": 2.0}
"""Numbers that an optimizer keeps of each weight; of Muon's matrices one less. tests/training/test_library.py measures them on meta."""
IN_FLIGHT = 2
"""Modules whose gradients are on their way to the host at one time (training/optimizers/host.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Residency:
    """The default is torch's AdamW on the device, after backward."""

    on_host: bool = False
    """Float32 weights, moments and the update; the device has weights in compute precision."""
    in_backward: bool = False
    """A layer's gradients are gone once it is updated."""
    algorithm: str = "adamw"
    """optim.algorithm."""
    orthogonalise_steps: int = 0
    """Steps of Newton-Schulz on each matrix of the decoder layers, which then has one number less of each weight; 0: no Muon."""
    moment_bytes: float | None = None
    """Bytes of one number of a moment; None: the master precision."""
    snapshot_bytes: int | None = None
    """Host memory of a rank for snapshots (checkpoint.pool_bytes); None: found by itself."""
    replicas: bool = False
    """Snapshots are kept in the memory of hosts too (checkpoint.replica)."""
    clipped: bool = True
    """Gradients are scaled where their norm is too large."""
    two_passes: bool = False
    """Forward and backward run once more, before, for the norm alone."""

    @property
    def state_numbers(self) -> float:
        """Numbers kept of each weight: AdamW's two moments."""
        return STORED[self.algorithm]

    @property
    def is_adamw(self) -> bool:
        """Whether states may go to the host, be smaller, and be updated in backward: AdamW's alone (training/optimizers/algorithms.py)."""
        return self.algorithm == "adamw"

    def state_bytes(self, master: int) -> float:
        """Bytes of state of one parameter: its moments, and the master weight where it is not the model's own."""
        return self.state_numbers * (self.moment_bytes or master) + master * self.on_host


ON_DEVICE = Residency()
"""What there is unless something else is asked for."""


def residency_of(optim: OptimConfig, checkpoint: CheckpointConfig | None = None) -> Residency:
    """What a configuration asks for."""
    kept: dict[str, Any] = {}
    if checkpoint is not None:
        kept = {"snapshot_bytes": checkpoint.pool_bytes, "replicas": checkpoint.replica.value == "peer"}
    return Residency(
        **kept,
        on_host=optim.state_device.value == "host",
        in_backward=optim.update.value == "backward",
        algorithm=optim.algorithm,
        orthogonalise_steps=optim.muon_steps if optim.algorithm == "muon" else 0,
        moment_bytes=MOMENT_BYTES[optim.state_dtype.value],
        clipped=optim.grad_clip is not None,
        two_passes=optim.update.value == "backward" and optim.grad_clip is not None and optim.clip_mode.value == "two_pass",
    )

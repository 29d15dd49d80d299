"""Settings of the optimizer: how weights are updated, and where its states lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ...utils.ranges import STEPS, Range

ADAMW, MUON = "adamw", "muon"
"""Values of optim.algorithm that are no library's."""


class StateDevice(Enum):
    """Where the optimizer's numbers live."""

    DEVICE = "device"
    """Float32 weights and both moments on the device, 1/shard of each a rank."""
    HOST = "host"
    """Float32 weights and both moments in host memory, updated there; the device has the weights in compute precision only."""


class Update(Enum):
    """When the optimizer updates."""

    STEP = "step"
    """Updates after the whole backward pass: all gradients exist, and a step with a bad number is not applied at all."""
    BACKWARD = "backward"
    """Each layer as soon as its gradients are reduced, which are then freed: exact, but what is applied cannot be taken back."""


class ClipMode(Enum):
    """Which norm gradients are clipped by; anything but `global` is for update=backward."""

    GLOBAL = "global"
    """Norm of this step's whole gradient: exact, needs all of it before the first update."""
    TWO_PASS = "two_pass"
    """Norm of the whole gradient from a backward pass of its own, which keeps no gradients: exact, twice the time."""
    PREVIOUS_NORM = "previous_norm"
    """Norm of the step before: not exact, a sudden large gradient is clipped a step too late."""


class StateDtype(Enum):
    """Precision of both moments; anything but float32 is inexact and needs torchao (the extra `lowbit`)."""

    FLOAT32 = "float32"
    """Precision of the master weights (float64 in a float64 run)."""
    BFLOAT16 = "bfloat16"
    INT8 = "8bit"
    """Blocks of 256 numbers share a scale; tensors that are small or not of whole blocks keep float32."""


class MuonScale(Enum):
    """How large the update of a matrix is beside optim.lr, by its shape; torch.optim.Muon's names."""

    MATCH_RMS_ADAMW = "match_rms_adamw"
    """0.2 sqrt(longer side): as large as AdamW's updates are, so optim.lr and optim.weight_decay are AdamW's."""
    ORIGINAL = "original"
    """sqrt(max(1, rows / columns)): rates of about 0.02, so optim.muon_lr_ratio is needed beside AdamW."""


class ScheduleOnResume(Enum):
    """What becomes of the learning rate's schedule where a run is resumed with another train.steps."""

    KEEP = "keep"
    """It stays as it was: every step has the rate it would have had; steps after its end have its last rate."""
    STRETCH = "stretch"
    """It is taken over the new train.steps, so the rate of the next step changes at once."""
    REWARM = "rewarm"
    """A new one over the steps that are left: warm-up from the last rate to the peak, then the decay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """An optimizer on float32 master weights, and its schedule."""

    name: str
    algorithm: str = "adamw"
    """adamw; muon (matrices of decoder layers by Muon, the rest by AdamW); or one of a library (training/optimizers/algorithms.py)."""
    lr: float
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Weight decay, on matrices only; norms, biases and embeddings are not decayed."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    schedule: str = "cosine"
    """cosine, linear (to zero), wsd (warm-up, stable, linear decay) or constant."""
    warmup_steps: int | None = 0
    """Steps in which the rate rises to its peak; null: 20, or a quarter of the steps where that is less."""
    decay_steps: int | None = None
    """wsd only: steps of the final decay."""
    min_lr_ratio: float = 0.0
    """cosine only: last learning rate as a share of the peak."""
    schedule_on_resume: ScheduleOnResume = ScheduleOnResume.KEEP
    """Schedule where train.steps is another than before. keep never changes the rate of a step; stretch and rewarm do, and say so."""
    state_device: StateDevice = StateDevice.DEVICE
    """Where float32 weights and moments live; host frees 10 bytes a parameter of the device in bfloat16 runs, and updates on the CPU."""
    update: Update = Update.STEP
    """backward frees each layer's gradient as soon as it is applied, and overlaps a host update with the backward of the next layer."""
    clip_mode: ClipMode = ClipMode.GLOBAL
    """Which norm grad_clip means. previous_norm is not exact."""
    state_dtype: StateDtype = StateDtype.FLOAT32
    """Precision of the moments. bfloat16 and 8bit are not exact."""
    muon_momentum: float = 0.95
    """muon only: share of the momentum that a step keeps."""
    muon_steps: int = 5
    """muon only: steps of Newton-Schulz."""
    muon_scale: MuonScale = MuonScale.MATCH_RMS_ADAMW
    """muon only: size of a matrix's update by its shape."""
    muon_lr_ratio: float = 1.0
    """muon only: learning rate of the matrices over optim.lr, which the rest has."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "lr": Range(0, 1e38, above=True, example=3e-4),
        "betas": Range(0, 1, below=True),
        "eps": Range(0, 1, above=True),
        "weight_decay": Range(0, 1000),
        "grad_clip": Range(0, 1e30, above=True),
        "warmup_steps": Range(0, STEPS),
        "decay_steps": Range(1, STEPS),
        "min_lr_ratio": Range(0, 1),
        "muon_momentum": Range(0, 1, below=True),
        "muon_steps": Range(1, 99),
        "muon_lr_ratio": Range(0, 1e6, above=True),
    }

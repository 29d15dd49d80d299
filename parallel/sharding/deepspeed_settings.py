"""Decides what DeepSpeed is told: the dictionary its engine is made with. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAST_STEP = 10**12
"""A step that never comes: DeepSpeed prints nothing of its own."""


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """What a ZeRO engine depends on."""

    stage: int
    """1: optimizer states are sharded, 2: gradients as well, 3: weights as well."""
    dtype: str
    """Precision of computation: bfloat16 or float32. Masters, gradients and states are float32."""
    grad_clip: float | None
    layer_numbers: int
    """Numbers of the largest decoder layer: what is gathered ahead and reduced at one time."""
    largest_numbers: int
    """Numbers of the largest parameter: it must fit into a bucket."""
    on_gpu: bool
    gathers_ahead: bool = True
    """Stage 3: the next layer's weights are on their way while one runs."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Keys of zero_optimization that go to DeepSpeed as they are (engine.zero)."""


def deepspeed_config(settings: ZeroSettings) -> dict[str, Any]:
    """The configuration of `deepspeed.initialize` (0.19).

    One micro-batch is one step to its counters: where a step ends is said before each backward instead, for plans differ from step
    to step. Gradients of micro-batches are added in float32, whatever they were computed in.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": LAST_STEP,
        "gradient_clipping": settings.grad_clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero(settings) | _asked(settings),
    }
    if settings.stage < 3:
        # Losses are shares of one mean: their gradients add up. Stage 3 has means only (`gradient_factor`).
        config["gradient_allreduce_op"] = "sum"
    if settings.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    return config


def _zero(settings: ZeroSettings) -> dict[str, Any]:
    bucket = max(settings.layer_numbers, settings.largest_numbers)
    zero: dict[str, Any] = {"stage": settings.stage, "overlap_comm": settings.on_gpu, "reduce_bucket_size": bucket}
    if settings.stage < 3:
        return zero | {"allgather_bucket_size": bucket}
    return zero | {
        # Every weight is sharded, however small; the next layer is gathered ahead, and none is kept for a second use.
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": settings.layer_numbers * settings.gathers_ahead,
        "stage3_max_live_parameters": 2 * settings.layer_numbers,
        "stage3_max_reuse_distance": 0,
    }


def _asked(settings: ZeroSettings) -> dict[str, Any]:
    """What was asked for, in place of what is chosen here; two sizes have bounds that this model sets."""
    asked = dict(settings.asked)
    if "reduce_bucket_size" in asked:
        asked["reduce_bucket_size"] = max(asked["reduce_bucket_size"], settings.largest_numbers)
    if not settings.gathers_ahead:
        asked.pop("stage3_prefetch_bucket_size", None)
    return asked


def gradient_factor(stage: int, world_size: int) -> int:
    """What a loss is multiplied by, so that its gradients are summed over ranks: stage 3 divides every sum by the ranks."""
    return world_size if stage == 3 else 1

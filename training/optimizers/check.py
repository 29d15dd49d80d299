"""Decides which combinations of residency, update, clipping and precision make sense, in words and bytes. Pure, no torch."""

from __future__ import annotations

from ...errors import ConfigError
from ..config import Dtype
from .algorithms import LIBRARY
from .config import ADAMW, MUON, ClipMode, OptimConfig, StateDevice, StateDtype, Update


def check_residency(optim: OptimConfig, dtype: Dtype) -> None:
    """Raise ConfigError for combinations of optim.update, grad_clip, clip_mode and state_dtype that cannot be meant."""
    backward = optim.update is Update.BACKWARD
    if backward and optim.grad_clip is not None and optim.clip_mode is ClipMode.GLOBAL:
        raise ConfigError(
            "optim.update",
            found=f"backward with optim.grad_clip={optim.grad_clip:g} and optim.clip_mode=global",
            expected="a norm that is known before the first layer is updated: the global one is known after the last gradient",
            hint="optim.clip_mode=two_pass (exact, twice the time), optim.clip_mode=previous_norm (not exact), or optim.grad_clip=null",
        )
    if optim.clip_mode is not ClipMode.GLOBAL:
        _check_mode(optim)
    if optim.state_dtype is not StateDtype.FLOAT32 and dtype is Dtype.FLOAT64:
        raise ConfigError(
            "optim.state_dtype",
            found=f"{optim.state_dtype.value} with train.dtype=float64",
            expected="float32, which means the run's own precision: there is nothing to save in a float64 run",
            hint="optim.state_dtype=float32, or train.dtype=bfloat16",
        )


def _check_mode(optim: OptimConfig) -> None:
    mode = optim.clip_mode.value
    if optim.update is Update.STEP:
        raise ConfigError(
            "optim.clip_mode",
            found=f"{mode} with optim.update=step",
            expected="global: all gradients are there, so their own norm is known",
            hint="optim.clip_mode=global, or optim.update=backward",
        )
    if optim.grad_clip is None:
        raise ConfigError(
            "optim.clip_mode",
            found=f"{mode} with optim.grad_clip=null",
            expected="global: nothing is clipped",
            hint="optim.clip_mode=global, or optim.grad_clip=1.0",
        )


def inexact(optim: OptimConfig) -> tuple[str, ...]:
    """What makes this optimizer differ from plain AdamW on the same gradients, in words; empty where nothing does."""
    reasons = []
    if optim.clip_mode is ClipMode.PREVIOUS_NORM:
        reasons.append("gradients are clipped by the norm of the step before (optim.clip_mode=previous_norm), not by their own")
    if optim.state_dtype is not StateDtype.FLOAT32:
        reasons.append(f"moments are rounded to {optim.state_dtype.value} after every update (optim.state_dtype)")
    return tuple(reasons)


USUAL_RATES = {"dpo": 1e-6, "grpo": 1e-6}
"""Peak learning rates of the presets optim=dpo and optim=grpo (TRL's defaults for both), by objective."""
FAR_ABOVE = 50.0
"""Times the usual rate that are no choice but an oversight; adapters are trained with about ten times as much."""


def rate_notes(optim: OptimConfig, objective: str) -> list[str]:
    """What is to be said of a learning rate that is not this objective's: pretraining's is 300 times too large for preferences."""
    usual = USUAL_RATES.get(objective)
    if usual is None or optim.lr <= FAR_ABOVE * usual:
        return []
    times = f"{optim.lr / usual:,.0f} times the usual rate of train.objective={objective}"
    return [f"optim.lr={optim.lr:g} is {times}: optim={objective} has it"]


def describe(optim: OptimConfig) -> str:
    """One line: where the states live, when they change, what is not exact."""
    place = "host memory, weights on the device in compute precision" if optim.state_device is StateDevice.HOST else "device memory"
    when = "each layer in backward" if optim.update is Update.BACKWARD else "after backward"
    extra = {ClipMode.GLOBAL: "", ClipMode.TWO_PASS: ", one more backward pass for the norm"}.get(optim.clip_mode, "")
    rest = "".join(f"; NOT EXACT: {line}" for line in inexact(optim))
    return f"{_named(optim.algorithm)}, states in {place}, updated {when}{extra}{rest}"


def _named(algorithm: str) -> str:
    if algorithm == MUON:
        return "Muon for matrices of decoder layers, AdamW for the rest"
    return "AdamW" if algorithm == ADAMW else f"{LIBRARY[algorithm].name} of {LIBRARY[algorithm].module}"

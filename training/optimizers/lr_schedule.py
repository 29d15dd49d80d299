"""The learning rate as a pure function of the step. No torch."""

from __future__ import annotations

import math

from ...errors import ConfigError
from ...utils.ranges import check_ranges
from .algorithms import LIBRARY, num_betas
from .config import OptimConfig

SCHEDULES = ("cosine", "linear", "wsd", "constant")


MAX_DEFAULT_WARMUP = 20
"""Number of updates in the warm-up of a schedule over `total_steps`."""


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Number of updates in the warm-up of a schedule over `total_steps`."""
    return min(MAX_DEFAULT_WARMUP, total_steps // 4) if config.warmup_steps is None else config.warmup_steps


def learning_rate(config: OptimConfig, step: int, total_steps: int, *, start: int = 0, base: float = 0.0) -> float:
    """The rate of update `step` (0-based, as the sampler counts) of a schedule over the updates from `start` to `total_steps`.

    Warm-up rises in equal steps from `base` and reaches the peak at its last update. After it, with x the share of the
    remaining updates already made: cosine falls from the peak to min_lr_ratio, linear to zero, wsd stays and falls to zero over
    the last `decay_steps`, constant stays. x is 1 only after the last update, so no update of the schedule has rate zero.
    Updates after `total_steps` have the rate of x = 1.
    """
    done, length = step - start, total_steps - start
    warmup = warmup_steps(config, length)
    if done < warmup:
        return base + (config.lr - base) * (done + 1) / warmup
    return config.lr * _decay(config, done, warmup, length)


def _decay(config: OptimConfig, done: int, warmup: int, length: int) -> float:
    share = min(1.0, (done - warmup) / (length - warmup)) if length > warmup else 1.0
    if config.schedule == "cosine":
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "linear":
        return 1 - share
    if config.schedule == "wsd":
        assert config.decay_steps is not None
        return min(1.0, max(0.0, (length - done) / config.decay_steps))
    assert config.schedule == "constant", config.schedule
    return 1.0


def ends_at_zero(config: OptimConfig, total_steps: int) -> bool:
    """Whether updates after the schedule's end would have rate zero."""
    return learning_rate(config, total_steps, total_steps) == 0


def check_optim(config: OptimConfig, total_steps: int) -> None:
    """Raise ConfigError unless the optimizer's numbers can be used for `total_steps` updates."""
    _check_numbers(config)
    if config.schedule not in SCHEDULES:
        raise _wrong("schedule", f"`{config.schedule}`", f"one of {', '.join(SCHEDULES)}", "optim.schedule=cosine")
    if warmup_steps(config, total_steps) > total_steps:
        expected = f"0 to train.steps = {total_steps}, or null for as many as fit"
        raise _wrong("warmup_steps", str(config.warmup_steps), expected, f"optim.warmup_steps={max(1, total_steps // 10)}")
    if config.schedule == "wsd":
        _check_wsd(config, total_steps)
    elif config.decay_steps is not None:
        actual = f"{config.decay_steps} with schedule {config.schedule}"
        raise _wrong("decay_steps", actual, "null: only wsd has a decay of its own", "optim.schedule=wsd or optim.decay_steps=null")


def _check_wsd(config: OptimConfig, total_steps: int) -> None:
    rest = total_steps - warmup_steps(config, total_steps)
    if config.decay_steps is None or not 1 <= config.decay_steps <= rest:
        expected = f"1 to {rest} steps for the final decay (train.steps - optim.warmup_steps)"
        raise _wrong("decay_steps", str(config.decay_steps), expected, f"optim.decay_steps={max(1, rest // 5)}")


def _check_numbers(config: OptimConfig) -> None:
    check_ranges(config, "optim")
    if len(config.betas) != 2 and num_betas(config.algorithm) == 2:
        raise _wrong("betas", str(config.betas), "two numbers from 0 to below 1", "optim.betas=[0.9,0.95]")
    if len(config.betas) != 3 and num_betas(config.algorithm) == 3:
        three = f"three numbers from 0 to below 1: optim.algorithm={config.algorithm} has as many"
        raise _wrong("betas", str(config.betas), three, f"optim.betas={LIBRARY[config.algorithm].betas}")


def _wrong(key: str, actual: str, expected: str, hint: str) -> ConfigError:
    return ConfigError(f"optim.{key}", found=actual, expected=expected, hint=hint)

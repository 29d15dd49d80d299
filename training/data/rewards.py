"""Reads the rewards of a completion: a number, or several by name, which are added up by weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .messages import bad_record, kind_of, shown

Reward = float | dict[str, float]
"""One number, or several by name."""


def read_reward(where: str, value: Any) -> Reward:
    """The reward that stands in a record; DataError for anything but finite numbers."""
    if not isinstance(value, dict):
        return _number(where, value, "reward")
    if not value:
        raise bad_record(where, "no reward", "a finite number, or several by name")
    return {name: _number(where, number, f"reward.{name}") for name, number in value.items()}


def _number(where: str, value: Any, name: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise bad_record(where, "no reward" if value is None else f"{shown(value)} in '{name}'", "a finite number")
    return number


def total_reward(where: str, reward: Reward, weights: Mapping[str, float]) -> float:
    """The sum of weight x reward by name; a name without a weight counts once. DataError for a weight of a reward that is not there."""
    if not isinstance(reward, dict):
        if weights:
            raise bad_record(where, f"{kind_of(reward)} in 'reward'", f"rewards by name, for the weights of {', '.join(weights)}")
        return reward
    missing = [name for name in weights if name not in reward]
    if missing:
        raise bad_record(where, f"rewards {', '.join(reward)}", f"also {', '.join(missing)}, which has a weight")
    return math.fsum(weights.get(name, 1.0) * number for name, number in reward.items())

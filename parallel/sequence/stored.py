"""A cost model read back from checkpoints and metrics. Imports no torch, so that what explains a run can read it too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import PlanError
from .cost import CostModel, DegreeCost


def load_cost(data: Mapping[str, Any]) -> CostModel:
    """The inverse of dataclasses.asdict, through JSON. ValueError for what is none: people and crashes damage files."""
    try:
        degrees = tuple(
            DegreeCost(**_numbers(row), windowed_s=tuple((int(w), float(s)) for w, s in row["windowed_s"])) for row in data["degrees"]
        )
        excluded = tuple((int(degree), str(reason)) for degree, reason in data["excluded"])
        return CostModel(**_numbers(data), degrees=degrees, excluded=excluded)
    except (TypeError, KeyError, AttributeError, PlanError) as error:
        raise ValueError(f"no cost model ({type(error).__name__}: {error})") from error


_GROUPS = ("degrees", "excluded", "windowed_s")


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """The plain fields of a group; ValueError where one that is to be a number is none."""
    plain = {name: value for name, value in group.items() if name not in _GROUPS}
    for name, value in plain.items():
        if name != "source" and (not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value)):
            raise ValueError(f"no cost model: {name} is {value!r}")
    return plain

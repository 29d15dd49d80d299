"""A cost model read back from checkpoints and metrics. Imports no torch, so that what explains a run can read it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cost import CostModel, DegreeCost


def load_cost(data: Mapping[str, Any]) -> CostModel:
    """The inverse of dataclasses.asdict, through JSON."""
    degrees = tuple(DegreeCost(**{**row, "windowed_s": tuple((int(w), float(s)) for w, s in row["windowed_s"])}) for row in data["degrees"])
    excluded = tuple((int(degree), str(reason)) for degree, reason in data["excluded"])
    return CostModel(**{**data, "degrees": degrees, "excluded": excluded})

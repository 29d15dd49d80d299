"""Fits peaks at several lengths, widths and layer counts, and gives bytes per token of Llama-3-8B. Pure.

A peak is fixed bytes + slope x tokens. A slope is linear in what a token owns: numbers per hidden unit, per head (log-sum-exp),
per head dim (rotary tables), and the rest (ids, masks); and linear in the number of layers. Both are fitted and
both report how far the measured values are from the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .peers.shape import LLAMA_8B, LLAMA_8B_LAYERS, Shape


@dataclass(frozen=True, slots=True)
class Line:
    """`value(x) = offset + slope x`; `residual`: largest distance of a point from it, relative to the point."""

    slope: float
    offset: float
    residual: float


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares through (x, y) points with at least two different x."""
    if len({x for x, _ in points}) < 2:
        raise ValueError(f"a line needs two different x, not {points}")
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    offset = mean_y - slope * mean_x
    return Line(slope, offset, max(abs(offset + slope * x - y) / max(abs(y), 1e-9) for x, y in points))


@dataclass(frozen=True, slots=True)
class PerToken:
    """Bytes per token at Llama-8B's width: `per_layer` x layers + `independent`."""

    per_layer: float
    independent: float
    residual: float
    """Relative residual of the fit over widths, the worst over layer counts."""

    @property
    def total(self) -> float:
        return self.per_layer * LLAMA_8B_LAYERS + self.independent

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total, "kib": self.total / 1024}


def at_llama_8b(slopes: Mapping[int, Mapping[Shape, float]]) -> PerToken:
    """`slopes`: layers -> shape -> bytes per token; at least two layer counts and four shapes that differ in heads and head dim."""
    wide = {layers: _at_width(by_shape) for layers, by_shape in slopes.items()}
    line = fit_line([(layers, value) for layers, (value, _) in wide.items()])
    return PerToken(line.slope, line.offset, max(residual for _, residual in wide.values()))


def _at_width(slopes: Mapping[Shape, float]) -> tuple[float, float]:
    """Bytes per token at Llama-8B's width, and the worst relative distance of a measured width from the fit."""
    import numpy as np

    rows = np.array([_owned(shape) for shape in slopes], dtype=float)
    values = np.array(list(slopes.values()))
    if np.linalg.matrix_rank(rows) < rows.shape[1]:
        raise ValueError(f"these widths cannot be told apart: {list(slopes)}")
    solution, *_ = np.linalg.lstsq(rows, values, rcond=None)
    residual = np.abs(rows @ solution - values) / np.maximum(np.abs(values), 1e-9)
    return float(np.array(_owned(LLAMA_8B), dtype=float) @ solution), float(residual.max())


def _owned(shape: Shape) -> tuple[int, int, int, int]:
    return shape.hidden_size, shape.num_heads, shape.head_dim, 1


LONGEST = 3 << 22
"""About the longest sequence of Llama-8B for which eight 80 GB GPUs and their host have a plan: what `auto` is solved for."""
GIB = 1 << 30
DEVICE_GIB = 80.0
FIXED_DEVICE_GIB = 24.5
"""Llama-8B on one device, alike for every scheme: context 2, bfloat16 weights 15.0, one layer's gradients in both widths 1.6,
embedding and head gradients 2.0, one chunk's work 4; optimizer states on the host, each layer's gradients handed over."""
HOST_MISC_GIB = 8.0
HOSTS = {"128 GiB, LoRA": (128.0, 0.0), "1.9 TB, full fine-tuning with fp32 states": (1.9e12 / GIB, 12.0)}
"""Host memory in GiB, and optimizer bytes per parameter that lie in it."""
PARAMETERS = 8_030_261_248


def max_tokens(device_bytes: float, host_bytes: float) -> dict[str, dict[str, Any]]:
    """Derived, not measured: the longest sequence per budget from bytes per token on device and host, and what binds."""
    return {name: _bound(device_bytes, host_bytes, *host) for name, host in HOSTS.items()}


def max_tokens_by_segments(device_bytes: float) -> dict[str, dict[str, Any]]:
    """Largest lengths of a scheme with layer inputs on the host and as many layers to a stored input as is best for each budget.

    Host bytes are 2 x hidden for each of the L / k segments and the live one's other inputs; more layers to a segment take time.
    """
    largest = {}
    for name, host in HOSTS.items():
        stored = {k: -(-LLAMA_8B_LAYERS // k) + k - 1 for k in range(1, 9)}
        bounds = {k: _bound(device_bytes, 2 * LLAMA_8B.hidden_size * inputs, *host) for k, inputs in stored.items()}
        best = max(bounds, key=lambda k: (bounds[k]["tokens"], -k))
        largest[name] = bounds[best] | {"segment_layers": best}
    return largest


def _bound(device_bytes: float, host_bytes: float, host_gib: float, states: float) -> dict[str, Any]:
    bounds = {"device": (DEVICE_GIB - FIXED_DEVICE_GIB) * GIB / device_bytes}
    if host_bytes > 0:
        bounds["host"] = max(0.0, ((host_gib - HOST_MISC_GIB) * GIB - states * PARAMETERS) / host_bytes)
    binding = min(bounds, key=lambda key: bounds[key])
    return {"tokens": int(bounds[binding]), "binds": binding}

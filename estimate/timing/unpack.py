"""Time in which matrices are read beside their products: packed ones are made wide, of others norms of rows are made. Pure.

Note: mirrors model/adapters/{quantized,nf4,dora}.py: each product of each piece of rows, forward, recomputed and backward, does so anew.
"""

from __future__ import annotations

from ..plan_inputs import PlanInputs
from .bandwidth import device_update_rate
from .flops import backward_flops, inner_share, recompute_linear_flops, segment_flops

TOUCHED_BYTES = 20.5
"""Bytes that are read and written for a number beside its wide form: half a byte of codes, index, and float32 made, scaled and read."""


def unpack_s(inputs: PlanInputs) -> float:
    """Seconds of one rank in one micro-batch; 0 where nothing is packed, or the bandwidth of its memory is not known."""
    rate = device_update_rate(inputs).bytes_per_s
    if not inputs.packed_layer_parameters or rate is None:
        return 0.0
    return _numbers(inputs, inputs.packed_layer_parameters) * (TOUCHED_BYTES + inputs.width) / rate


def norms_s(inputs: PlanInputs) -> float:
    """Seconds of one rank in one micro-batch for norms of rows (adapter.dora): each matrix is read twice, once for W A^T; 0 without."""
    rate = device_update_rate(inputs).bytes_per_s
    if not inputs.turned_layer_parameters:
        return 0.0
    read_s = 0.0 if rate is None else 2 * inputs.width / rate
    return _numbers(inputs, inputs.turned_layer_parameters) * (read_s + 2.0 * inputs.adapter.rank / inputs.gemm_rate)


def _numbers(inputs: PlanInputs, of_layer: int) -> float:
    """Numbers that are read in a micro-batch, `of_layer` of them in one layer for one piece of rows."""
    pieces = -(-inputs.tokens // inputs.piece_tokens)
    return len(inputs.layers) * of_layer * pieces * unpacked_times(inputs)


def unpacked_times(inputs: PlanInputs) -> float:
    """How often a matrix is read for one piece: forward, backward, and as often as its product is recomputed (the layer's mean)."""
    forward = 2.0 * inputs.active_layer_parameters
    again = recompute_linear_flops(inputs) + inner_share(inputs) * segment_flops(inputs)
    return 1.0 + (backward_flops(inputs) + again) / forward

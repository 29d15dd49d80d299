"""Time in which packed matrices are made wide for their products. Pure.

Note: mirrors model/adapters/{quantized,nf4}.py: each product of each piece of rows, forward, recomputed and backward, unpacks its matrix.
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
    pieces = -(-inputs.tokens // inputs.piece_tokens)
    numbers = len(inputs.layers) * inputs.packed_layer_parameters * pieces * unpacked_times(inputs)
    return numbers * (TOUCHED_BYTES + inputs.width) / rate


def unpacked_times(inputs: PlanInputs) -> float:
    """How often a matrix is unpacked for one piece: forward, backward, and as often as its product is recomputed (the layer's mean)."""
    forward = 2.0 * inputs.active_layer_parameters
    again = recompute_linear_flops(inputs) + inner_share(inputs) * segment_flops(inputs)
    return 1.0 + (backward_flops(inputs) + again) / forward

"""What a pipeline's schedules are planned with: a configured model as layers that cost seconds and bytes of one rank. Pure.

Arithmetic, as in timing/: FLOPs over the cluster's rate. Exchanges within a stage's sequence group and gathers of weights are left out,
as if computation hid them. A layer with a window costs each token the whole window.
"""

from __future__ import annotations

from ..memory.activation_classes import ATTENTION_OUTPUT
from ..parallel.pipeline.work import LayerLoad, ModelLoad
from .footprint.activations import class_bytes
from .plan_inputs import PlanInputs

STATE_BYTES = 16
"""Bytes of a weight, its gradient and AdamW's two moments, in single precision."""


def pipeline_model(inputs: PlanInputs, *, group: int, weight_shards: int) -> ModelLoad:
    """A model whose micro-batches are whole sequences, each cut evenly over `group` ranks of a stage.

    `weight_shards`: ranks of a stage over which weights, gradients and states are cut.
    """
    spec, size = inputs.spec, class_bytes(inputs)
    # A pair's backward takes PAIR_BACKWARD times its forward there: the rate is that of both together.
    rate, pairs = inputs.gemm_rate * group, inputs.attention_rate.both * group
    width = spec.hidden_size * inputs.width / group
    matrix = spec.vocab_size * spec.hidden_size
    layers = []
    for layer, window in zip(inputs.layers, spec.windows, strict=True):
        near = 0.0 if window is None else 4.0 * spec.query_size * window
        layers.append(
            LayerLoad(
                token_s=2.0 * layer.active / rate + near / pairs,
                pair_s=0.0 if near else 4.0 * spec.query_size / pairs,
                kept_bytes=sum(size.values()) / group,
                attention_bytes=size[ATTENTION_OUTPUT.name] / group,
                input_bytes=width,
                fixed_bytes=layer.total * STATE_BYTES / weight_shards,
            )
        )
    # The head's logits are made by chunks: its input alone waits. A tied matrix is on both ends.
    head = LayerLoad(
        token_s=2.0 * matrix / rate,
        kept_bytes=width,
        input_bytes=width,
        fixed_bytes=(matrix + spec.hidden_size) * STATE_BYTES / weight_shards,
    )
    return ModelLoad(layers=tuple(layers), embedding=LayerLoad(fixed_bytes=matrix * STATE_BYTES / weight_shards), head=head)

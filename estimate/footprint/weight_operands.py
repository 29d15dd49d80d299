"""What waits for gradients of weights that are made in a pass of their own: operands of products, of micro-batches whose inputs' are done.

Note: mirrors memory/executor/weight_products.py. Of each product of a layer's matrices its input and its output's gradient wait; an input
that several share is there once. What a layer kept for its backward is gone by then, so this stands in its place. Pure.
"""

from __future__ import annotations

from ...parallel.pipeline.config import PipelineOrder
from ..plan_inputs import PlanInputs
from .term import BACKWARD, Phase, Term


def makes_weights_apart(inputs: PlanInputs) -> bool:
    """Whether backward leaves gradients of matrices to a pass of their own."""
    return inputs.layout.stages > 1 and inputs.parallel.pipeline.order is PipelineOrder.ZERO_BUBBLE


def operand_row(inputs: PlanInputs) -> int:
    """Bytes of one token in the layer where they are most: experts have none, they make their gradients in backward."""
    spec, experts = inputs.spec, inputs.spec.experts
    # The norm's output, which queries, keys and values share; once more for each visit that makes them in turns.
    visits = 1 if inputs.policy.graph else 2 if inputs.by_chunks else inputs.policy.head_groups
    attention = visits * spec.hidden_size + 2 * (spec.query_size + spec.kv_size) + spec.hidden_size
    dense = 2 * spec.hidden_size + 3 * spec.intermediate_size
    if experts is None:
        return inputs.width * (attention + dense)
    shared = (2 * spec.hidden_size + 3 * experts.shared_size + 1) * (experts.shared_size > 0)
    return inputs.width * (attention + max(shared, dense * bool(spec.dense_layers)))


def weight_operands(inputs: PlanInputs, layer: int) -> Term:
    """Those of the micro-batches that wait, and of the live one from its last layer down to this.

    Rank r of R has R - r micro-batches in flight, and r whose weights' gradients it puts off (parallel/pipeline/generators.py).
    """
    note = "inputs and gradients of products, until the pass of weights' gradients"
    if not makes_weights_apart(inputs):
        return Term("operands of weight gradients", note, {})
    one, count = operand_row(inputs) * inputs.tokens, inputs.spec.num_layers
    waiting = (inputs.layout.stages - inputs.in_flight) * count * one
    by_phase = {Phase.FORWARD: waiting, Phase.LOSS: waiting} | dict.fromkeys(BACKWARD, waiting + (count - layer) * one)
    return Term("operands of weight gradients", note, by_phase | {Phase.REDUCE: waiting + count * one})

"""Weights and their gradients on one rank: sharded, gathered and on their way. Pure.

The formulas follow FSDP2 as parallel/sharding/fsdp2.py uses it (torch/distributed/fsdp/_fully_shard): in forward the flat buffer of
a gather lives until the next layer's copies are made, in backward the next layer's is on its way; the input of a reduction
lives until the next one starts. `layer` is the layer whose backward the backward phases describe, of those from 0 to L - 1.
"""

from __future__ import annotations

from ...model.adapters.names import ATTENTION, QKV
from ...model.adapters.nf4_layout import STRIP_NUMBERS
from ...model.adapters.targets import quantized
from ...model.spec import feed_forward_weights
from ..plan_inputs import PlanInputs, reduces_once
from .optimizer import gradients_left, weight_bytes
from .term import BACKWARD, COMPUTE, FORWARD_ALONE, KEEPING, Phase, Term, term


def weights(inputs: PlanInputs) -> Term:
    each, frozen = weight_bytes(inputs), inputs.parameters - inputs.trained_parameters
    kind = f"{'bfloat' if each == 2 else 'float'}{8 * each}"
    beside = f"; those that are frozen {inputs.width} bytes each" if frozen and each != inputs.width else ""
    beside += "; packed matrices in NF4" if inputs.packed_layer_parameters else ""
    whole = each * inputs.trained_parameters + inputs.width * frozen - len(inputs.layers) * inputs.packed_layer_savings
    num_bytes = whole / inputs.layout.shard
    return term("weights", f"{kind}, 1/{inputs.layout.shard} of each{beside}", num_bytes)


def gradients(inputs: PlanInputs, layer: int) -> Term:
    """Sharded: of the layers done; of all from the first micro-batch on where each is reduced."""
    total = inputs.master * inputs.trained_parameters // inputs.layout.shard
    early = total if inputs.layout.num_micro_batches > 1 and not reduces_once(inputs) else 0
    done = inputs.master * inputs.trained_decoder_parameters(layer + 1) // inputs.layout.shard
    by_phase = {Phase.FORWARD: early, Phase.LOSS: early} | dict.fromkeys(BACKWARD, early or done * (not reduces_once(inputs)))
    layers = early or inputs.master * inputs.trained_decoder_parameters() // inputs.layout.shard
    whole = by_phase | {Phase.REDUCE: layers, Phase.OPTIMIZER: total}
    return gradients_left(inputs, Term("gradients", f"float{8 * inputs.master}, 1/{inputs.layout.shard} of each", whole))


def whole_gradients(inputs: PlanInputs) -> Term:
    """Reduced once per step, gradients of all weights pile up unsharded; at the end only those of embedding and head are left."""
    whole = inputs.master * inputs.trained_gathered_parameters * reduces_once(inputs)
    by_phase = dict.fromkeys(KEEPING, whole) | {Phase.REDUCE: inputs.master * inputs.trained_root_parameters * reduces_once(inputs)}
    return Term("gradients, whole", "kept over micro-batches, reduced once a step", by_phase)


def gathered_root(inputs: PlanInputs) -> Term:
    return term(
        "embedding and head, gathered",
        "in compute precision, from forward to the end of backward",
        inputs.width * inputs.root_parameters,
        (*KEEPING, *FORWARD_ALONE),
    )


def gathered_layers(inputs: PlanInputs, layer: int) -> Term:
    """The running layer, and with several shards the buffer of one more gather."""
    one, several = inputs.width * inputs.gathered_layer_parameters - inputs.packed_layer_savings, inputs.layout.shard > 1
    if inputs.parallel.barrier_free:
        note = "all layers, in compute precision, from the first micro-batch to the last"
        num_bytes = inputs.width * inputs.decoder_parameters() - len(inputs.layers) * inputs.packed_layer_savings
        return term("layers, gathered", note, num_bytes, (*KEEPING, *FORWARD_ALONE))
    # The layer below is gathered ahead; where its input is recomputed from its segment's, that gather is used up by then.
    ahead = one * (several and layer > 0 and not inputs_recomputed(inputs, layer))
    by_phase = {Phase.FORWARD: (1 + several) * one, Phase.LOSS: several * one, Phase.LAYER_REDUCE: ahead}
    by_phase |= {Phase.EVALUATION: by_phase[Phase.FORWARD], Phase.EVALUATION_LOSS: by_phase[Phase.LOSS]}
    by_phase |= dict.fromkeys((Phase.BACKWARD_MLP, Phase.BACKWARD_ATTENTION, Phase.BACKWARD_PROJECTIONS), one + ahead)
    if inputs_recomputed(inputs, layer):
        by_phase[Phase.SEGMENT] = (2 + several) * one
    return Term("layers, gathered", "the running layer" + ", and a gather's buffer" * several + ", in compute precision", by_phase)


def unpacked_matrix(inputs: PlanInputs) -> Term:
    """The packed matrix that a product runs with, whole in compute precision, and indices and numbers of the strip that is unpacked.

    Note: mirrors model/adapters/{quantized,nf4}.py, one product at a time.
    """
    sizes = {matrix.name: (matrix.largest_rows * matrix.columns, matrix.columns) for matrix in quantized(inputs.adapter, inputs.spec)}
    each = {name: inputs.width * whole + STRIP_BYTES * max(row, min(whole, STRIP_NUMBERS)) for name, (whole, row) in sizes.items()}
    projections = (*ATTENTION[:3], QKV)
    before = max((each[name] for name in each if name in projections), default=0)
    after = max((each[name] for name in each if name not in projections), default=0)
    by_phase = dict.fromkeys((Phase.FORWARD, Phase.EVALUATION, Phase.SEGMENT), max(before, after))
    by_phase |= {Phase.BACKWARD_MLP: after, Phase.BACKWARD_ATTENTION: before, Phase.BACKWARD_PROJECTIONS: before}
    return Term("unpacked matrix", "of one product, and what unpacks it", by_phase)


STRIP_BYTES = 6
"""Bytes of each number of a strip: half an index of 4 bytes, and float32."""


def inputs_recomputed(inputs: PlanInputs, layer: int) -> bool:
    """Whether this layer's backward starts by running the layers below it in its segment."""
    last = layer % inputs.segment_layers == inputs.segment_layers - 1 or layer == inputs.spec.num_layers - 1
    return last and layer % inputs.segment_layers > 0


def reduction(inputs: PlanInputs, layer: int) -> Term:
    """Input of the last reduction, which lives on until the next; with one shard its output goes through a copy."""
    one, only = inputs.master * inputs.trained_layer_parameters, inputs.layout.shard == 1
    root = inputs.master * inputs.trained_root_parameters
    # Of the micro-batch before, as long as this one has reduced nothing.
    earlier = root * (inputs.layout.num_micro_batches > 1) * (not reduces_once(inputs))
    own = inputs.width * inputs.trained_layer_parameters
    by_phase = dict.fromkeys((Phase.FORWARD, Phase.LOSS), earlier)
    by_phase |= dict.fromkeys(BACKWARD, one * (not reduces_once(inputs)) if layer < inputs.spec.num_layers - 1 else earlier)
    by_phase[Phase.LAYER_REDUCE] = max(own + one, one + one * only + one // inputs.layout.shard)
    copied = root * (1 + only) + root // inputs.layout.shard
    by_phase[Phase.REDUCE] = max(root + inputs.width * inputs.trained_root_parameters * (not reduces_once(inputs)), copied)
    return Term("reduction", "one layer's gradients on their way; last those of embedding and head", by_phase)


def layer_gradients(inputs: PlanInputs) -> Term:
    """Gradients of the live layer while pieces of rows add to them: compute precision after one, master precision after more."""
    spec = inputs.spec
    if not inputs.trains_all:
        return _adapter_gradients(inputs)
    mlp, whole = feed_forward_weights(spec, inputs.parameters_elsewhere), inputs.gathered_layer_parameters
    output = spec.hidden_size * spec.query_size
    # Of experts all gradients are counted where they are made (live_mixture.py).
    down = spec.hidden_size * spec.intermediate_size if spec.experts is None or spec.dense_layers else 0
    wide = inputs.master if inputs.in_pieces else inputs.width
    by_phase = {
        # One piece alone: those of the last product. More: all sums, and a part of one.
        Phase.BACKWARD_MLP: wide * (mlp + output) + inputs.width * down if inputs.in_pieces else inputs.width * down,
        Phase.BACKWARD_ATTENTION: wide * (mlp + output),
        Phase.BACKWARD_PROJECTIONS: wide * whole,
    }
    if inputs.policy.graph or inputs.by_chunks:
        by_phase[Phase.BACKWARD_ATTENTION] = wide * (whole if inputs.by_chunks and inputs.in_pieces else mlp + output)
    if inputs.by_chunks and inputs.in_pieces:
        by_phase[Phase.BACKWARD_MLP] = wide * whole + inputs.width * down
    return Term("layer gradients", f"of one layer, summed in float{8 * wide}", by_phase)


def _adapter_gradients(inputs: PlanInputs) -> Term:
    """All sums of a layer's trained weights, and a part of as many: next to nothing beside the matrices they adapt."""
    own = (inputs.master if inputs.in_pieces else inputs.width) * inputs.trained_layer_parameters
    live = (Phase.BACKWARD_MLP, Phase.BACKWARD_ATTENTION, Phase.BACKWARD_PROJECTIONS)
    by_phase = dict.fromkeys(live, own + inputs.width * inputs.trained_layer_parameters)
    return Term("layer gradients", "of one layer's adapters and what else is trained", by_phase)


def head_gradient(inputs: PlanInputs) -> Term:
    """Summed in master precision over chunks, each chunk's part beside it; then in compute precision to the end of backward."""
    head = inputs.trained_head_parameters
    by_phase = {Phase.LOSS: inputs.master * head} | dict.fromkeys(BACKWARD, inputs.width * head)
    return Term("head gradient", f"summed in float{8 * inputs.master} over chunks", by_phase)


def batch(inputs: PlanInputs) -> Term:
    """Token, target and position ids, document lengths, and rotary tables."""
    width = inputs.master if inputs.spec.wide_tables else inputs.width
    per_token = 4 * 8 + 1 + 2 * inputs.spec.rotary_tables * inputs.spec.head_dim * width
    return term("batch and rotary tables", "ids of the micro-batch, cos and sin", inputs.in_flight * per_token * inputs.tokens, COMPUTE)

"""Weights and their gradients on one rank: sharded, gathered and on their way. Pure.

The formulas follow FSDP2 as parallel/sharding.py uses it (torch/distributed/fsdp/_fully_shard): in forward the flat buffer of
a gather lives until the next layer's copies are made, in backward the next layer's is on its way; the input of a reduction
lives until the next one starts. `layer` is the layer whose backward the backward phases describe, of those from 0 to L - 1.
"""

from __future__ import annotations

from .setting import BACKWARD, COMPUTE, KEEPING, Phase, Setting, Term, reduces_once, term
from .terms_optimizer import gradients_left, weight_bytes


def weights(s: Setting) -> Term:
    each = weight_bytes(s)
    kind = f"{'bfloat' if each == 2 else 'float'}{8 * each}"
    return term("weights", f"{kind}, 1/{s.layout.shard} of each", each * s.parameters / s.layout.shard)


def gradients(s: Setting, layer: int) -> Term:
    """Sharded: of the layers done; of all from the first micro-batch on where each is reduced."""
    total = s.master * s.parameters // s.layout.shard
    early = total if s.layout.num_micro_batches > 1 and not reduces_once(s) else 0
    done = s.master * s.layer_parameters * (s.spec.num_layers - 1 - layer) // s.layout.shard
    held = {Phase.FORWARD: early, Phase.LOSS: early} | dict.fromkeys(BACKWARD, early or done * (not reduces_once(s)))
    layers = early or s.master * s.spec.num_layers * s.layer_parameters // s.layout.shard
    whole = held | {Phase.REDUCE: layers, Phase.OPTIMIZER: total}
    return gradients_left(s, Term("gradients", f"float{8 * s.master}, 1/{s.layout.shard} of each", whole))


def whole_gradients(s: Setting) -> Term:
    """Reduced once per step, gradients of all weights pile up unsharded; at the end only those of embedding and head are left."""
    whole = s.master * s.parameters * reduces_once(s)
    held = dict.fromkeys(KEEPING, whole) | {Phase.REDUCE: s.master * s.root_parameters * reduces_once(s)}
    return Term("gradients, whole", "kept over micro-batches, reduced once a step", held)


def gathered_root(s: Setting) -> Term:
    return term(
        "embedding and head, gathered", "in compute precision, from forward to the end of backward", s.width * s.root_parameters, KEEPING
    )


def gathered_layers(s: Setting, layer: int) -> Term:
    """The running layer, and with several shards the buffer of one more gather."""
    one, several = s.width * s.layer_parameters, s.layout.shard > 1
    if s.parallel.barrier_free:
        note = "all layers, in compute precision, from the first micro-batch to the last"
        return term("layers, gathered", note, s.spec.num_layers * one, KEEPING)
    # The layer below is gathered ahead; where its input is made again from its segment's, that gather is used up by then.
    ahead = one * (several and layer > 0 and not inputs_made_again(s, layer))
    held = {Phase.FORWARD: (1 + several) * one, Phase.LOSS: several * one, Phase.LAYER_REDUCE: ahead}
    held |= dict.fromkeys((Phase.BACKWARD_MLP, Phase.BACKWARD_ATTENTION, Phase.BACKWARD_PROJECTIONS), one + ahead)
    if inputs_made_again(s, layer):
        held[Phase.SEGMENT] = (2 + several) * one
    return Term("layers, gathered", "the running layer" + ", and a gather's buffer" * several + ", in compute precision", held)


def inputs_made_again(s: Setting, layer: int) -> bool:
    """Whether this layer's backward starts by running the layers below it in its segment."""
    last = layer % s.segment_layers == s.segment_layers - 1 or layer == s.spec.num_layers - 1
    return last and layer % s.segment_layers > 0


def reduction(s: Setting, layer: int) -> Term:
    """Input of the last reduction, which lives on until the next; with one shard its output goes through a copy."""
    one, only = s.master * s.layer_parameters, s.layout.shard == 1
    root = s.master * s.root_parameters
    # Of the micro-batch before, as long as this one has reduced nothing.
    earlier = root * (s.layout.num_micro_batches > 1) * (not reduces_once(s))
    own = s.width * s.layer_parameters
    held = dict.fromkeys((Phase.FORWARD, Phase.LOSS), earlier)
    held |= dict.fromkeys(BACKWARD, one * (not reduces_once(s)) if layer < s.spec.num_layers - 1 else earlier)
    held[Phase.LAYER_REDUCE] = max(own + one, one + one * only + one // s.layout.shard)
    copied = root * (1 + only) + root // s.layout.shard
    held[Phase.REDUCE] = max(root + s.width * s.root_parameters * (not reduces_once(s)), copied)
    return Term("reduction", "one layer's gradients on their way; last those of embedding and head", held)


def layer_gradients(s: Setting) -> Term:
    """As pieces of rows add to them: in compute precision after the first, in master precision after more."""
    spec = s.spec
    mlp = 3 * spec.hidden_size * spec.intermediate_size
    output = spec.hidden_size * spec.query_size
    down = spec.hidden_size * spec.intermediate_size
    wide = s.master if s.in_pieces else s.width
    held = {
        # One piece alone: those of the last product. More: all sums, and a part of one.
        Phase.BACKWARD_MLP: wide * (mlp + output) + s.width * down if s.in_pieces else s.width * down,
        Phase.BACKWARD_ATTENTION: wide * (mlp + output),
        Phase.BACKWARD_PROJECTIONS: wide * s.layer_parameters,
    }
    if s.policy.graph or s.by_chunks:
        held[Phase.BACKWARD_ATTENTION] = wide * (s.layer_parameters if s.by_chunks and s.in_pieces else mlp + output)
    if s.by_chunks and s.in_pieces:
        held[Phase.BACKWARD_MLP] = wide * s.layer_parameters + s.width * down
    return Term("layer gradients", f"of one layer, summed in float{8 * wide}", held)


def head_gradient(s: Setting) -> Term:
    """Summed in master precision over chunks, each chunk's part beside it; then in compute precision to the end of backward."""
    head = s.spec.vocab_size * s.spec.hidden_size
    held = {Phase.LOSS: s.master * head} | dict.fromkeys(BACKWARD, s.width * head)
    return Term("head gradient", f"summed in float{8 * s.master} over chunks", held)


def batch(s: Setting) -> Term:
    """Token, target and position ids, document lengths, and rotary tables."""
    per_token = 4 * 8 + 1 + 2 * s.spec.rotary_tables * s.spec.head_dim * s.width
    return term("batch and rotary tables", "ids of the micro-batch, cos and sin", per_token * s.tokens, COMPUTE)

"""What waits between forward and backward, by class of activation: on the device, on the host, or nowhere. Pure.

What a token of each class takes follows from the table of activation_classes.py; terms, times and the solver (estimate/solver/solve.py)
all start from `class_bytes`. Splits are shares of a rank's tokens (memory/policy.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from ...memory.activation_classes import (
    ATTENTION_OUTPUT,
    EXPERT_GATE_UP,
    KEY_VALUE,
    LAYER_INPUT,
    QUERY,
    RESIDUAL,
    ActivationClass,
    activation_classes,
    after_attention,
)
from ...memory.policy import AHEAD, Split
from ...model.spec import ModelSpec
from ...parallel.pipeline.place import SENDS_UNDER_WAY
from ...parallel.pipeline.step_actions import DEPTH
from ..plan_inputs import PlanInputs
from .term import BACKWARD, FORWARD_ALONE, KEEPING, Phase, Term


def class_bytes(inputs: PlanInputs) -> dict[str, int]:
    """Bytes of one token in one layer, by class."""
    size = dict(_class_sizes(inputs.spec, inputs.width, inputs.master))
    if inputs.expert_parallel > 1:
        # Gate and up are of the rows whose experts are here, not of this rank's tokens.
        size[EXPERT_GATE_UP.name] = int(size[EXPERT_GATE_UP.name] * inputs.row_share)
    return size


@lru_cache(maxsize=64)  # a search for a policy asks for the same one over and over
def _class_sizes(spec: ModelSpec, width: int, master: int) -> tuple[tuple[str, int], ...]:
    return tuple(
        (kind.name, kind.numbers_per_token(spec) * width + kind.wide_numbers_per_token(spec) * master) for kind in activation_classes(spec)
    )


def class_layers(inputs: PlanInputs) -> dict[str, int]:
    """Most layers in which each class waits at one time: layer inputs one a segment and the live segment's own.

    A layer counts once for each micro-batch in flight.
    """
    layers = {
        kind.name: inputs.stored_inputs if kind is LAYER_INPUT else inputs.spec.num_layers for kind in activation_classes(inputs.spec)
    }
    return {name: inputs.in_flight * count for name, count in layers.items()}


def class_splits(inputs: PlanInputs) -> dict[str, Split]:
    """The policy's shares of each class that the model's layers have."""
    return {kind.name: inputs.policy.split(kind) for kind in activation_classes(inputs.spec)}


def moved_by_class(inputs: PlanInputs) -> dict[str, int]:
    """Bytes of one rank that wait on the host (or in files), all layers."""
    layers, size = class_layers(inputs), class_bytes(inputs)
    rows = {name: split.rows(inputs.tokens) for name, split in class_splits(inputs).items()}
    return {name: 0 if inputs.policy.graph else layers[name] * size[name] * (moved - kept) for name, (kept, moved) in rows.items()}


def inputs_at(inputs: PlanInputs, layer: int) -> int:
    """Layer inputs there are when a layer's backward starts: one of each segment up to its own, and those of its segment's layers."""
    return layer // inputs.segment_layers + layer % inputs.segment_layers + 1


def layer_inputs(inputs: PlanInputs, layer: int) -> Term:
    """Layer inputs that wait; with segments the inner inputs of the live one come in backward only."""
    per_layer = inputs.policy.layer_input.rows(inputs.tokens)[0] * class_bytes(inputs)[LAYER_INPUT.name]
    first = -(-inputs.spec.num_layers // inputs.segment_layers)
    note = f"{first} of {inputs.spec.num_layers} layers" + f" and {inputs.segment_layers - 1} of the live segment" * (
        inputs.segment_layers > 1
    )
    by_phase = {phase: first * per_layer for phase in (Phase.FORWARD, Phase.LOSS)} | dict.fromkeys(
        BACKWARD, inputs_at(inputs, layer) * per_layer
    )
    by_phase[Phase.LAYER_REDUCE] -= per_layer
    return _in_flight_too(inputs, Term("layer inputs", f"{note}, one hidden vector a token", by_phase))


def attention_outputs(inputs: PlanInputs, layer: int) -> Term:
    """Output and log-sum-exp."""
    rows = 0 if inputs.policy.graph else inputs.policy.attention_output.rows(inputs.tokens)[0]
    by_phase = _while_kept(inputs, layer, rows * class_bytes(inputs)[ATTENTION_OUTPUT.name])
    return _in_flight_too(inputs, Term("attention outputs kept", "output and log-sum-exp of every layer", by_phase))


def activations(inputs: PlanInputs, layer: int) -> Term:
    """Kept of everything else. With a graph: all that the other layers' backward needs (the last is the live layer)."""
    if inputs.policy.graph:
        others = {phase: (inputs.spec.num_layers - 1) * graph_row(inputs) * inputs.tokens for phase in (Phase.FORWARD, Phase.LOSS)}
        by_phase = others | dict.fromkeys(BACKWARD, layer * graph_row(inputs) * inputs.tokens)
        by_phase[Phase.LOSS] += graph_row(inputs) * inputs.tokens
        return _in_flight_too(inputs, Term("activations kept", "all that the other layers' backward needs", by_phase))
    stored = [kind.name for kind in activation_classes(inputs.spec) if kind not in (LAYER_INPUT, ATTENTION_OUTPUT)]
    splits, size = class_splits(inputs), class_bytes(inputs)
    kept = {name: splits[name].rows(inputs.tokens)[0] * size[name] for name in stored}
    names = ", ".join(name.replace("_", " and ") for name, num_bytes in kept.items() if num_bytes)
    return _in_flight_too(inputs, Term("activations kept", f"{names} of every layer", _while_kept(inputs, layer, sum(kept.values()))))


def _in_flight_too(inputs: PlanInputs, live: Term) -> Term:
    """`live` is of the micro-batch that runs; of each other in flight all layers hold what their forward left."""
    waiting = (inputs.in_flight - 1) * live.by_phase[Phase.LOSS]
    return Term(live.name, live.note, live.by_phase | {phase: live.by_phase[phase] + waiting for phase in KEEPING}) if waiting else live


def between_stages(inputs: PlanInputs) -> Term:
    """What a stage received and what it sends on, whole until its backward, of each micro-batch in flight; and the live one's gradient.

    Received rows that are kept as the first layer's input are there once.
    """
    row, ends = class_bytes(inputs)[LAYER_INPUT.name], (not inputs.has_embedding) + (not inputs.has_head)
    kept = inputs.tokens if inputs.policy.graph else inputs.policy.layer_input.rows(inputs.tokens)[0]
    shared = kept * (not inputs.has_embedding)
    if inputs.num_parts > 1:
        ends, shared = 2 * inputs.num_parts, 0
    by_phase = inputs.in_flight * row * (inputs.tokens * ends - shared)
    one = row * inputs.tokens * (ends > 0)
    alone = dict.fromkeys(FORWARD_ALONE, one * min(ends, 2)) | {Phase.REDUCE: one}
    return Term("activations between stages", "received, sent, and a gradient", dict.fromkeys(KEEPING, by_phase) | alone)


def messages(inputs: PlanInputs) -> Term:
    """What waits on the links between stages (parallel/pipeline/links.py): one receive of each kind ahead, and gradients on their way."""
    row = class_bytes(inputs)[LAYER_INPUT.name]
    from_before, from_behind = not inputs.has_embedding, not inputs.has_head
    if inputs.num_parts > 1:
        from_before, from_behind = True, True
    ahead = DEPTH[inputs.parallel.pipeline.order]
    row *= inputs.layout.stages > 1
    both = from_before * (ahead + SENDS_UNDER_WAY) + from_behind * ahead
    forward_alone = from_before * ahead + from_behind * SENDS_UNDER_WAY
    by_phase = dict.fromkeys(KEEPING, both * row * inputs.tokens) | dict.fromkeys(FORWARD_ALONE, forward_alone * row * inputs.tokens)
    return Term("messages between stages", "received ahead of use, or not yet taken", by_phase)


def _while_kept(inputs: PlanInputs, layer: int, per_layer: int) -> dict[Phase, int]:
    by_phase = dict.fromkeys((Phase.FORWARD, Phase.LOSS), inputs.spec.num_layers * per_layer)
    by_phase |= dict.fromkeys(BACKWARD, (layer + 1) * per_layer)
    by_phase[Phase.LAYER_REDUCE] = layer * per_layer
    return by_phase


def in_flight(inputs: PlanInputs, layer: int) -> Term:
    """Source rows of copies to the host that still run, and buffers that rows come back to: a piece's, and a few ahead of it.

    A class that is only in part on the host is made where it is not: its live rows are the live layer's.
    """
    splits = {} if inputs.policy.graph else {name: split for name, split in class_splits(inputs).items() if split.host > 0}
    size, rows = class_bytes(inputs), {name: split.rows(inputs.tokens)[1] - split.rows(inputs.tokens)[0] for name, split in splits.items()}
    whole = set() if inputs.by_chunks or not inputs.in_pieces else {QUERY.name, KEY_VALUE.name, ATTENTION_OUTPUT.name}
    late = {QUERY.name, KEY_VALUE.name} if not inputs.by_chunks and inputs.policy.attention_output.complete else set()
    piece = {name for name, split in splits.items() if split.complete} - whole
    ahead = _ahead(inputs, layer, rows)
    leaving = sum(size[name] * count for name, count in rows.items())
    largest = max((size[name] for name in rows), default=0) * inputs.piece_tokens
    by_phase = {Phase.FORWARD: min(leaving, max(IN_FLIGHT_BYTES, largest)) * inputs.on_gpu}
    by_phase |= dict.fromkeys(BACKWARD, inputs.piece_tokens * (ahead + sum(size[name] for name in piece)))
    by_phase[Phase.BACKWARD_MLP] -= inputs.piece_tokens * sum(size[name] for name in piece & late)
    # The live layer's own rows have its input in them already.
    by_phase[Phase.SEGMENT] -= inputs.piece_tokens * sum(size[name] for name in piece & {LAYER_INPUT.name})
    by_phase[Phase.LAYER_REDUCE] = inputs.piece_tokens * ahead
    return Term("host copies in flight", "rows on their way to the host, and back a few pieces ahead", by_phase)


def _ahead(inputs: PlanInputs, layer: int, rows: Mapping[str, int]) -> int:
    """Bytes a row of what is prefetched (memory/executor/saved.py): of this layer's next piece or of the layer below."""
    middle, after = (QUERY, ATTENTION_OUTPUT) if inputs.by_chunks else (), after_attention(activation_classes(inputs.spec))
    visits = [(LAYER_INPUT, *middle, *after), *([] if inputs.by_chunks else [(QUERY, KEY_VALUE, LAYER_INPUT)])]
    here = max(_first(inputs, visit, rows, several=True) for visit in visits)
    if layer == 0:
        return here
    # A segment below is recomputed first: what its layers have to make is not read.
    recomputed = inputs.segment_layers > 1 and layer % inputs.segment_layers == 0 and RESIDUAL.name in rows
    below = after if recomputed else (ATTENTION_OUTPUT, LAYER_INPUT, KEY_VALUE, QUERY, *after)
    # With one class a piece, the layer below is prefetched while another piece is still to come.
    alone = sum(kind.name in rows for kind in below) == 1 and inputs.in_pieces
    return max(here, _first(inputs, below, rows, AHEAD + alone))


def _first(
    inputs: PlanInputs, kinds: Sequence[ActivationClass], rows: Mapping[str, int], count: int = AHEAD, *, several: bool = False
) -> int:
    """Bytes a row of the first `count` of the classes that come back, over and over; `several`: in more than one piece."""
    coming = ([kind.name for kind in kinds if kind.name in rows] * count)[:count]
    size = class_bytes(inputs)
    return sum(size[name] for name in coming if not several or rows[name] > inputs.piece_tokens)


IN_FLIGHT_BYTES = 1 << 30
"""Limit of memory/offload/open.py: rows whose copy to the host may not be done hold at most so much, or one piece."""


def graph_row(inputs: PlanInputs) -> int:
    """Bytes a token leaves in one layer's graph between its forward and its backward, besides the layer's input."""
    spec, width = inputs.spec, inputs.width
    # A frozen norm's normalised value is in no gradient. (Where norms multiply in float32 it counts all the same.)
    unread = 0 if inputs.trains_norms or spec.norm_product_in_float32 else width
    of_heads = norm_bytes(inputs) * (spec.query_size + spec.kv_size) * spec.qk_norm
    norms = (norm_bytes(inputs) - unread) * spec.hidden_size * spec.norms_computed + of_heads
    residual = spec.hidden_size * width if width == 4 else 0  # bfloat16 norms save a float32 copy instead
    residual += (spec.residual_size - spec.hidden_size) * width
    projected = width * (spec.query_size + 2 * spec.kv_size)
    attention = class_bytes(inputs)[ATTENTION_OUTPUT.name]
    if inputs.layout.ulysses > 1:
        attention += width * (2 * spec.query_size + 2 * inputs.kv_copies * spec.kv_size)
    return norms + residual + projected + attention + _feed_forward_graph_row(inputs)


def _feed_forward_graph_row(inputs: PlanInputs) -> int:
    """Dense: gate, up, activation and product. Experts: gate and up alone, what the shared one has, and the routing with its softmax.

    Of both kinds of layers, where a model has them, the larger.
    """
    spec, width = inputs.spec, inputs.width
    dense = 4 * spec.intermediate_size * width
    if spec.experts is None:
        return dense
    experts = spec.experts
    logits = 2 * inputs.master if experts.has_wide_router else width + inputs.master
    routing = logits * experts.num_experts + (20 + 4 * inputs.master) * experts.per_token
    routing += inputs.master * spec.hidden_size * experts.has_wide_router * (inputs.master > width)
    shared = (2 * experts.shared_size + spec.hidden_size) * width * (experts.shared_size > 0)
    inner = int(2 * width * (experts.per_token * experts.inner_size * inputs.row_share + experts.shared_size))
    came = int(width * spec.hidden_size * experts.per_token * inputs.row_share) * (inputs.expert_parallel > 1)
    return max(inner + came + shared + routing, dense * bool(spec.dense_layers))


def norm_bytes(inputs: PlanInputs) -> int:
    """Bytes per number that an RMS norm and the product after it save: float32 copy, normalised value and output."""
    if inputs.spec.norm_product_in_float32:
        return {2: 10, 4: 8, 8: 20}[inputs.width]
    return {2: 8, 4: 8, 8: 20}[inputs.width]

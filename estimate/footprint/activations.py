"""What waits between forward and backward, by class of activation: on the device, on the host, or nowhere. Pure.

`class_bytes` is the one place that says what a token of each class takes; terms, times and the solver (estimate/solver/solve.py)
all start from it. Splits are shares of a rank's tokens (memory/policy.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...memory.policy import AHEAD
from ..plan_inputs import PlanInputs
from .term import BACKWARD, Phase, Term


def class_bytes(inputs: PlanInputs) -> dict[str, int]:
    """Bytes of one token in one layer, by class."""
    spec, width = inputs.spec, inputs.width
    return {
        "layer_input": spec.hidden_size * width,
        "query": spec.query_size * width,
        "key_value": 2 * spec.kv_size * width,
        "attention_output": spec.query_size * width + spec.num_heads * inputs.master,
        "residual": spec.hidden_size * width,
        "mlp": 2 * spec.intermediate_size * width,
    }


def class_layers(inputs: PlanInputs) -> dict[str, int]:
    """In how many layers each class waits at most at one time: layer inputs one a segment and the live segment's own."""
    return {name: inputs.stored_inputs if name == "layer_input" else inputs.spec.num_layers for name in class_bytes(inputs)}


def moved_by_class(inputs: PlanInputs) -> dict[str, int]:
    """Bytes of one rank that wait on the host (or in files), all layers."""
    rows = {name: split.rows(inputs.tokens) for name, split in inputs.policy.splits.items()}
    return {name: 0 if inputs.policy.graph else _all_layers(inputs, name, moved - kept) for name, (kept, moved) in rows.items()}


def _all_layers(inputs: PlanInputs, name: str, rows: int) -> int:
    return class_layers(inputs)[name] * class_bytes(inputs)[name] * rows


def inputs_at(inputs: PlanInputs, layer: int) -> int:
    """Layer inputs there are when a layer's backward starts: one of each segment up to its own, and those of its segment's layers."""
    return layer // inputs.segment_layers + layer % inputs.segment_layers + 1


def layer_inputs(inputs: PlanInputs, layer: int) -> Term:
    """With segments the inner inputs of the live one come in backward only."""
    per_layer = inputs.policy.layer_input.rows(inputs.tokens)[0] * class_bytes(inputs)["layer_input"]
    first = -(-inputs.spec.num_layers // inputs.segment_layers)
    note = f"{first} of {inputs.spec.num_layers} layers" + f" and {inputs.segment_layers - 1} of the live segment" * (
        inputs.segment_layers > 1
    )
    held = {phase: first * per_layer for phase in (Phase.FORWARD, Phase.LOSS)} | dict.fromkeys(
        BACKWARD, inputs_at(inputs, layer) * per_layer
    )
    held[Phase.LAYER_REDUCE] -= per_layer
    return Term("layer inputs", f"{note}, one hidden vector a token", held)


def attention_outputs(inputs: PlanInputs, layer: int) -> Term:
    """Output and log-sum-exp."""
    rows = 0 if inputs.policy.graph else inputs.policy.attention_output.rows(inputs.tokens)[0]
    held = _while_kept(inputs, layer, rows * class_bytes(inputs)["attention_output"])
    return Term("attention outputs kept", "output and log-sum-exp of every layer", held)


def activations(inputs: PlanInputs, layer: int) -> Term:
    """Kept of everything else. With a graph: all that the other layers' backward needs (the last is the live layer)."""
    if inputs.policy.graph:
        others = {phase: (inputs.spec.num_layers - 1) * graph_row(inputs) * inputs.tokens for phase in (Phase.FORWARD, Phase.LOSS)}
        held = others | dict.fromkeys(BACKWARD, layer * graph_row(inputs) * inputs.tokens)
        held[Phase.LOSS] += graph_row(inputs) * inputs.tokens
        return Term("activations kept", "all that the other layers' backward needs", held)
    kept = {name: split.rows(inputs.tokens)[0] * class_bytes(inputs)[name] for name, split in inputs.policy.splits.items() if name in FREE}
    names = ", ".join(name.replace("_", " and ") for name, num_bytes in kept.items() if num_bytes)
    return Term("activations kept", f"{names} of every layer", _while_kept(inputs, layer, sum(kept.values())))


FREE = ("query", "key_value", "residual", "mlp")
"""Classes that may be recomputed in part."""


def _while_kept(inputs: PlanInputs, layer: int, per_layer: int) -> dict[Phase, int]:
    held = dict.fromkeys((Phase.FORWARD, Phase.LOSS), inputs.spec.num_layers * per_layer) | dict.fromkeys(BACKWARD, (layer + 1) * per_layer)
    held[Phase.LAYER_REDUCE] = layer * per_layer
    return held


def in_flight(inputs: PlanInputs, layer: int) -> Term:
    """Source rows of copies to the host that still run, and buffers that rows come back to: a piece's, and a few ahead of it.

    A class that is only in part on the host is made where it is not: its live rows are the live layer's.
    """
    splits = {} if inputs.policy.graph else {name: split for name, split in inputs.policy.splits.items() if split.host > 0}
    size, rows = class_bytes(inputs), {name: split.rows(inputs.tokens)[1] - split.rows(inputs.tokens)[0] for name, split in splits.items()}
    whole = set() if inputs.by_chunks or not inputs.in_pieces else {"query", "key_value", "attention_output"}
    late = {"query", "key_value"} if not inputs.by_chunks and inputs.policy.attention_output.complete else set()
    piece = {name for name, split in splits.items() if split.complete} - whole
    ahead = _ahead(inputs, layer, rows)
    leaving = sum(size[name] * count for name, count in rows.items())
    largest = max((size[name] for name in rows), default=0) * inputs.piece_tokens
    held = {Phase.FORWARD: min(leaving, max(IN_FLIGHT_BYTES, largest)) * inputs.on_gpu}
    held |= dict.fromkeys(BACKWARD, inputs.piece_tokens * (ahead + sum(size[name] for name in piece)))
    held[Phase.BACKWARD_MLP] -= inputs.piece_tokens * sum(size[name] for name in piece & late)
    # The live layer's own rows have its input in them already.
    held[Phase.SEGMENT] -= inputs.piece_tokens * sum(size[name] for name in piece & {"layer_input"})
    held[Phase.LAYER_REDUCE] = inputs.piece_tokens * ahead
    return Term("host copies in flight", "rows on their way to the host, and back a few pieces ahead", held)


def _ahead(inputs: PlanInputs, layer: int, rows: Mapping[str, int]) -> int:
    """Bytes a row of what is asked for before its use (memory/executor/saved.py): of this layer's next piece or of the layer below."""
    middle = ("query", "attention_output") if inputs.by_chunks else ()
    visits = [("layer_input", *middle, "residual", "mlp"), *([] if inputs.by_chunks else [("query", "key_value", "layer_input")])]
    here = max(_first(inputs, visit, rows, several=True) for visit in visits)
    if layer == 0:
        return here
    # A segment below runs again first: what its layers have to make is not read.
    again = inputs.segment_layers > 1 and layer % inputs.segment_layers == 0 and "residual" in rows
    below = ("residual", "mlp") if again else ("attention_output", "layer_input", "key_value", "query", "residual", "mlp")
    # With one class a piece, the layer below is asked for while another piece is still to come.
    alone = sum(name in rows for name in below) == 1 and inputs.in_pieces
    return max(here, _first(inputs, below, rows, AHEAD + alone))


def _first(inputs: PlanInputs, names: Sequence[str], rows: Mapping[str, int], count: int = AHEAD, *, several: bool = False) -> int:
    """Bytes a row of the first `count` of the classes that come back, over and over; `several`: in more than one piece."""
    coming = ([name for name in names if name in rows] * count)[:count]
    return sum(class_bytes(inputs)[name] for name in coming if not several or rows[name] > inputs.piece_tokens)


IN_FLIGHT_BYTES = 1 << 30
"""Of memory/offload/open.py: rows whose copy to the host may not be done hold at most so much, or one piece."""


def graph_row(inputs: PlanInputs) -> int:
    """Bytes a token leaves in one layer's graph between its forward and its backward, besides the layer's input."""
    spec, width = inputs.spec, inputs.width
    norms = (
        norm_bytes(inputs) * spec.hidden_size * spec.norms_per_layer + norm_bytes(inputs) * (spec.query_size + spec.kv_size) * spec.qk_norm
    )
    residual = spec.hidden_size * width if width == 4 else 0  # bfloat16 norms save a float32 copy instead
    projected = width * (spec.query_size + 2 * spec.kv_size)
    attention = class_bytes(inputs)["attention_output"]
    if inputs.layout.ulysses > 1:
        attention += width * (2 * spec.query_size + 2 * inputs.kv_copies * spec.kv_size)
    return norms + residual + projected + attention + 4 * spec.intermediate_size * width


def norm_bytes(inputs: PlanInputs) -> int:
    """Bytes per number that an RMS norm and the product after it save: float32 copy, normalised value and output."""
    from ...model.config import Family

    if inputs.spec.family in (Family.GEMMA2, Family.GEMMA3):
        return {2: 10, 4: 8, 8: 20}[inputs.width]
    return {2: 8, 4: 8, 8: 20}[inputs.width]

"""What waits between forward and backward, by class of activation: on the device, on the host, or nowhere. Pure.

`class_bytes` is the one place that says what a token of each class takes; terms, times and the solver (memory/solve.py)
all start from it. Splits are shares of a rank's tokens (memory/policy.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .policy import AHEAD
from .setting import BACKWARD, Phase, Setting, Term


def class_bytes(s: Setting) -> dict[str, int]:
    """Bytes of one token in one layer, by class."""
    spec, width = s.spec, s.width
    return {
        "layer_input": spec.hidden_size * width,
        "query": spec.query_size * width,
        "key_value": 2 * spec.kv_size * width,
        "attention_output": spec.query_size * width + spec.num_heads * s.master,
        "residual": spec.hidden_size * width,
        "mlp": 2 * spec.intermediate_size * width,
    }


def class_layers(s: Setting) -> dict[str, int]:
    """In how many layers each class waits at most at one time: layer inputs one a segment and the live segment's own."""
    return {name: s.stored_inputs if name == "layer_input" else s.spec.num_layers for name in class_bytes(s)}


def kept_by_class(s: Setting) -> dict[str, int]:
    """Bytes that wait on the device, all layers."""
    return {name: _all_layers(s, name, split.rows(s.tokens)[0]) for name, split in s.policy.splits.items()}


def moved_by_class(s: Setting) -> dict[str, int]:
    """Bytes of one rank that wait on the host (or in files), all layers."""
    rows = {name: split.rows(s.tokens) for name, split in s.policy.splits.items()}
    return {name: 0 if s.policy.graph else _all_layers(s, name, moved - kept) for name, (kept, moved) in rows.items()}


def _all_layers(s: Setting, name: str, rows: int) -> int:
    return class_layers(s)[name] * class_bytes(s)[name] * rows


def inputs_at(s: Setting, layer: int) -> int:
    """Layer inputs there are when a layer's backward starts: one of each segment up to its own, and those of its segment's layers."""
    return layer // s.segment_layers + layer % s.segment_layers + 1


def layer_inputs(s: Setting, layer: int) -> Term:
    """With segments the inner inputs of the live one come in backward only."""
    per_layer = s.policy.layer_input.rows(s.tokens)[0] * class_bytes(s)["layer_input"]
    first = -(-s.spec.num_layers // s.segment_layers)
    note = f"{first} of {s.spec.num_layers} layers" + f" and {s.segment_layers - 1} of the live segment" * (s.segment_layers > 1)
    held = {phase: first * per_layer for phase in (Phase.FORWARD, Phase.LOSS)} | dict.fromkeys(BACKWARD, inputs_at(s, layer) * per_layer)
    held[Phase.LAYER_REDUCE] -= per_layer
    return Term("layer inputs", f"{note}, one hidden vector a token", held)


def attention_outputs(s: Setting, layer: int) -> Term:
    """Output and log-sum-exp."""
    rows = 0 if s.policy.graph else s.policy.attention_output.rows(s.tokens)[0]
    held = _while_kept(s, layer, rows * class_bytes(s)["attention_output"])
    return Term("attention outputs kept", "output and log-sum-exp of every layer", held)


def activations(s: Setting, layer: int) -> Term:
    """Kept of everything else. With a graph: all that the other layers' backward needs (the last is the live layer)."""
    if s.policy.graph:
        others = {phase: (s.spec.num_layers - 1) * graph_row(s) * s.tokens for phase in (Phase.FORWARD, Phase.LOSS)}
        held = others | dict.fromkeys(BACKWARD, layer * graph_row(s) * s.tokens)
        held[Phase.LOSS] += graph_row(s) * s.tokens
        return Term("activations kept", "all that the other layers' backward needs", held)
    kept = {name: split.rows(s.tokens)[0] * class_bytes(s)[name] for name, split in s.policy.splits.items() if name in FREE}
    names = ", ".join(name.replace("_", " and ") for name, num_bytes in kept.items() if num_bytes)
    return Term("activations kept", f"{names} of every layer", _while_kept(s, layer, sum(kept.values())))


FREE = ("query", "key_value", "residual", "mlp")
"""Classes that may be recomputed in part."""


def _while_kept(s: Setting, layer: int, per_layer: int) -> dict[Phase, int]:
    held = dict.fromkeys((Phase.FORWARD, Phase.LOSS), s.spec.num_layers * per_layer) | dict.fromkeys(BACKWARD, (layer + 1) * per_layer)
    held[Phase.LAYER_REDUCE] = layer * per_layer
    return held


def in_flight(s: Setting, layer: int) -> Term:
    """Source rows of copies to the host that still run, and buffers that rows come back to: a piece's, and a few ahead of it.

    A class that is only in part on the host is made where it is not: its live rows are the live layer's.
    """
    splits = {} if s.policy.graph else {name: split for name, split in s.policy.splits.items() if split.host > 0}
    size, rows = class_bytes(s), {name: split.rows(s.tokens)[1] - split.rows(s.tokens)[0] for name, split in splits.items()}
    whole = set() if s.by_chunks or not s.in_pieces else {"query", "key_value", "attention_output"}
    late = {"query", "key_value"} if not s.by_chunks and s.policy.attention_output.complete else set()
    piece = {name for name, split in splits.items() if split.complete} - whole
    ahead = _ahead(s, layer, rows)
    leaving = sum(size[name] * count for name, count in rows.items())
    largest = max((size[name] for name in rows), default=0) * s.piece_tokens
    held = {Phase.FORWARD: min(leaving, max(IN_FLIGHT_BYTES, largest)) * s.on_gpu}
    held |= dict.fromkeys(BACKWARD, s.piece_tokens * (ahead + sum(size[name] for name in piece)))
    held[Phase.BACKWARD_MLP] -= s.piece_tokens * sum(size[name] for name in piece & late)
    # The live layer's own rows have its input in them already.
    held[Phase.SEGMENT] -= s.piece_tokens * sum(size[name] for name in piece & {"layer_input"})
    held[Phase.LAYER_REDUCE] = s.piece_tokens * ahead
    return Term("host copies in flight", "rows on their way to the host, and back a few pieces ahead", held)


def _ahead(s: Setting, layer: int, rows: Mapping[str, int]) -> int:
    """Bytes a row of what is asked for before its use (memory/saved.py): of this layer's next piece or of the layer below."""
    middle = ("query", "attention_output") if s.by_chunks else ()
    visits = [("layer_input", *middle, "residual", "mlp"), *([] if s.by_chunks else [("query", "key_value", "layer_input")])]
    here = max(_first(s, visit, rows, several=True) for visit in visits)
    if layer == 0:
        return here
    # A segment below runs again first: what its layers have to make is not read.
    again = s.segment_layers > 1 and layer % s.segment_layers == 0 and "residual" in rows
    below = ("residual", "mlp") if again else ("attention_output", "layer_input", "key_value", "query", "residual", "mlp")
    # With one class a piece, the layer below is asked for while another piece is still to come.
    alone = sum(name in rows for name in below) == 1 and s.in_pieces
    return max(here, _first(s, below, rows, AHEAD + alone))


def _first(s: Setting, names: Sequence[str], rows: Mapping[str, int], count: int = AHEAD, *, several: bool = False) -> int:
    """Bytes a row of the first `count` of the classes that come back, over and over; `several`: in more than one piece."""
    coming = ([name for name in names if name in rows] * count)[:count]
    return sum(class_bytes(s)[name] for name in coming if not several or rows[name] > s.piece_tokens)


IN_FLIGHT_BYTES = 1 << 30
"""Of memory/offload/open.py: rows whose copy to the host may not be done hold at most so much, or one piece."""


def graph_row(s: Setting) -> int:
    """Bytes a token leaves in one layer's graph between its forward and its backward, besides the layer's input."""
    spec, width = s.spec, s.width
    norms = norm_bytes(s) * spec.hidden_size * spec.norms_per_layer + norm_bytes(s) * (spec.query_size + spec.kv_size) * spec.qk_norm
    residual = spec.hidden_size * width if width == 4 else 0  # bfloat16 norms save a float32 copy instead
    projected = width * (spec.query_size + 2 * spec.kv_size)
    attention = class_bytes(s)["attention_output"]
    if s.layout.ulysses > 1:
        attention += width * (2 * spec.query_size + 2 * s.kv_copies * spec.kv_size)
    return norms + residual + projected + attention + 4 * spec.intermediate_size * width


def norm_bytes(s: Setting) -> int:
    """Bytes per number that an RMS norm and the product after it save: float32 copy, normalised value and output."""
    if s.spec.norm_product_in_float32:
        return {2: 10, 4: 8, 8: 20}[s.width]
    return {2: 8, 4: 8, 8: 20}[s.width]

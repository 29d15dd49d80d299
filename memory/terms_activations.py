"""What waits between forward and backward, by class of activation: on the device, on the host, or nowhere. Pure.

`class_bytes` is the one place that says what a token of each class takes; terms, times and the solver (memory/solve.py)
all start from it. Splits are shares of a rank's tokens (memory/policy.py).
"""

from __future__ import annotations

from .setting import BACKWARD, KEEPING, Phase, Setting, Term, term


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


def kept_bytes(s: Setting) -> int:
    """What forward leaves on the device for the backward of all layers."""
    return sum(made.num_bytes for made in (layer_inputs(s), attention_outputs(s), activations(s)))


def layer_inputs(s: Setting) -> Term:
    """With segments the inner inputs of the live one come in backward only."""
    rows, per_token = s.policy.layer_input.rows(s.tokens)[0], class_bytes(s)["layer_input"]
    first = -(-s.spec.num_layers // s.segment_layers)
    note = f"{first} of {s.spec.num_layers} layers" + f" and {s.segment_layers - 1} of the live segment" * (s.segment_layers > 1)
    held = {phase: first * rows * per_token for phase in (Phase.FORWARD, Phase.LOSS)}
    return Term("layer inputs", f"{note}, one hidden vector a token", held | dict.fromkeys(BACKWARD, s.stored_inputs * rows * per_token))


def attention_outputs(s: Setting) -> Term:
    kept = 0 if s.policy.graph else kept_by_class(s)["attention_output"]
    return term("attention outputs kept", "output and log-sum-exp of every layer", kept, KEEPING)


def activations(s: Setting) -> Term:
    """Kept of everything else. With a graph: all that the other layers' backward needs (the last is the live layer)."""
    if s.policy.graph:
        num_bytes = (s.spec.num_layers - 1) * saved_per_token(s) * s.tokens
        return term("activations kept", "all that the other layers' backward needs", num_bytes, KEEPING)
    kept = {name: num_bytes for name, num_bytes in kept_by_class(s).items() if name not in ("layer_input", "attention_output")}
    names = ", ".join(name.replace("_", " and ") for name, num_bytes in kept.items() if num_bytes)
    return term("activations kept", f"{names} of every layer", sum(kept.values()), KEEPING)


def in_flight(s: Setting) -> Term:
    """Source rows of copies to the host that still run, and buffers that rows come back to, a chunk ahead."""
    per_layer = {name: num_bytes / class_layers(s)[name] for name, num_bytes in moved_by_class(s).items()}
    leaving = sum(per_layer.values()) * s.on_gpu
    share = min(1.0, 2 * (s.chunk_tokens or s.tokens) / s.tokens)
    held = {Phase.FORWARD: leaving} | dict.fromkeys(BACKWARD, share * sum(per_layer.values()))
    note = "rows on their way to the host and back, about a layer's and two chunks'"
    return Term("host copies in flight", note, {phase: int(num_bytes) for phase, num_bytes in held.items()})


def saved_per_token(s: Setting) -> int:
    """Bytes a token leaves in one layer's graph between its forward and its backward, besides the layer's input."""
    after_norms = norm_bytes(s) * s.spec.hidden_size * (s.spec.norms_per_layer - 1)
    residual = s.spec.hidden_size * s.width if s.width == 4 else 0  # bfloat16 norms save a float32 copy instead
    mlp = 4 * s.spec.intermediate_size * s.width
    return before_attention_saved_per_token(s) + attention_saved_per_token(s) + after_norms + residual + mlp


def before_attention_saved_per_token(s: Setting) -> int:
    """First norm, projections q, k, v, and their own norms where the family has them."""
    projected = s.spec.query_size + 2 * s.spec.kv_size
    per_head = norm_bytes(s) * (s.spec.query_size + s.spec.kv_size) * s.spec.qk_norm
    return norm_bytes(s) * s.spec.hidden_size + s.width * projected + per_head


def attention_saved_per_token(s: Setting) -> int:
    """Output and log-sum-exp; beyond one Ulysses rank the exchanged q, k, v and the output on both sides."""
    output, lse = s.spec.query_size * s.width, s.spec.num_heads * s.master
    if s.layout.ulysses == 1:
        return output + lse
    return 2 * output + lse + s.width * (s.spec.query_size + 2 * s.kv_copies * s.spec.kv_size)


def norm_bytes(s: Setting) -> int:
    """Bytes per number that an RMS norm and the product after it save: float32 copy, normalised value and output."""
    return {2: 8, 4: 8, 8: 20}[s.width]

"""The layer that runs: rows of all tokens, and one piece of them at a time. Pure.

The formulas follow memory/executor/{token_local,feed_forward,attention_whole,attention_chunked,kept_graph}.py and
parallel/sequence/{ulysses,ring}.py, moment by moment: a phase holds the most that one of its moments does.

Legend, bytes of one row: H hidden, R the sum after attention, Q queries, K keys and values, X keys and values between the exchanges,
F feed-forward, E log-sum-exp.
"""

from __future__ import annotations

from dataclasses import replace

from ...memory.activation_classes import ATTENTION_OUTPUT, GATE_UP, KEY_VALUE, LAYER_INPUT, QUERY, RESIDUAL
from ...memory.policy import RECOMPUTED
from ..plan_inputs import PlanInputs
from .activations import graph_row, norm_bytes
from .kernels import attention_workspace
from .live_mixture import mixture_backward, mixture_forward, mixture_graph_backward
from .moment import Moment, Widths, is_kept, is_made, norm_backward
from .term import Phase, Term


def layer_rows(inputs: PlanInputs) -> tuple[Term, Term]:
    """What the live layer holds of all rows, and of one piece."""
    moments = graph_moments(inputs) if inputs.policy.graph else chunked_moments(inputs) if inputs.by_chunks else whole_moments(inputs)
    moments = moments | forward_alone_moments(inputs)
    largest = {
        phase: max(candidates, key=lambda moment: moment.whole * inputs.tokens + moment.piece * inputs.piece_tokens + moment.fixed)
        for phase, candidates in moments.items()
    }
    whole = {phase: int(moment.whole * inputs.tokens) for phase, moment in largest.items()}
    inner = _adapter_rows(inputs) * inputs.piece_tokens
    piece = {
        phase: int(moment.piece * inputs.piece_tokens + moment.fixed) + inner * (phase in _COMPUTING) for phase, moment in largest.items()
    }
    note = "everything between its ends" if not inputs.in_pieces else f"{inputs.piece_tokens} tokens of everything between its ends"
    return (
        Term(
            "live layer, all rows",
            f"what attention reads and makes, heads over {inputs.layout.ulysses}, ring of {inputs.layout.ring}",
            whole,
        ),
        Term("live layer, a piece", note, piece),
    )


_COMPUTING = (
    *(Phase.FORWARD, Phase.EVALUATION, Phase.SEGMENT),
    *(Phase.BACKWARD_MLP, Phase.BACKWARD_ATTENTION, Phase.BACKWARD_PROJECTIONS),
)


def _adapter_rows(inputs: PlanInputs) -> int:
    """Bytes of one row of x A^T and of dy B, of one product at a time (model/adapters/lora.py)."""
    return 2 * inputs.adapter.rank * inputs.width * inputs.adapter.is_trained


def forward_alone_moments(inputs: PlanInputs) -> dict[Phase, list[Moment]]:
    """A layer's forward without gradients: as with a policy that keeps nothing, and cuts the rows as this one does."""
    nothing = inputs.policy.with_splits(dict.fromkeys(inputs.policy.splits, RECOMPUTED))
    rows = inputs.piece_tokens if inputs.in_pieces else None
    bare = replace(inputs, policy=replace(nothing, graph=False, segment_layers=1, chunk_tokens=rows))
    moments = chunked_moments(bare) if bare.by_chunks else whole_moments(bare)
    w = Widths.of(inputs)
    return {Phase.EVALUATION: moments[Phase.FORWARD], Phase.EVALUATION_LOSS: [Moment(w.H)]}


def whole_moments(inputs: PlanInputs) -> dict[Phase, list[Moment]]:
    """memory/executor/attention_whole.py: attention over all rows at once, or over groups of heads one after the other."""
    w, part = Widths.of(inputs), Widths.of(inputs, inputs.policy.head_groups)
    own = 0 if is_kept(inputs, LAYER_INPUT) else w.H
    forward = _forward_moments(inputs, w, part)
    projected = [Moment(w.H + w.Q * inputs.in_pieces * _stored(inputs) + m.whole, m.piece) for m in forward[:-1]]
    return {
        Phase.FORWARD: [Moment(own + m.whole, m.piece) for m in forward],
        Phase.SEGMENT: [Moment(own + w.H + m.whole, m.piece) for m in forward] if inputs.segment_layers > 1 else [Moment(0)],
        Phase.BACKWARD_MLP: after_backward(inputs, w, _resident(inputs, w, part) + w.H + w.Q * inputs.in_pieces),
        Phase.BACKWARD_ATTENTION: [*projected, *_attention_backward(inputs, w, part)],
        Phase.BACKWARD_PROJECTIONS: [
            Moment(w.H + part.Q + part.K + (2 * w.Q + w.E) * (inputs.policy.head_groups > 1), before_backward_row(inputs, part))
        ],
        Phase.LAYER_REDUCE: [Moment(w.H)],
        Phase.LOSS: [Moment(w.H)],
    }


def _forward_moments(inputs: PlanInputs, w: Widths, part: Widths) -> list[Moment]:
    """Projections, the exchange, attention, the exchange back, and the second half; what stays with this layer is not counted twice."""
    cut, sides, groups = inputs.in_pieces, inputs.layout.ulysses > 1, inputs.policy.head_groups > 1
    made = part.Q * (not is_kept(inputs, QUERY)) + part.K * (not is_kept(inputs, KEY_VALUE))
    read = part.Q + part.X if sides else made
    ring = 3 * w.X + w.wide * w.Q if inputs.layout.ring > 1 else 0
    documents = inputs.packed * (part.Q + part.E) + w.wide * part.Q * _windows(inputs)
    output = (w.Q + w.E) * (not is_kept(inputs, ATTENTION_OUTPUT))
    others = output * groups
    moments = [
        Moment(others + made * cut, before_row(inputs, part)),
        Moment(others + read + (part.Q + part.E if groups else output) + ring + documents),
        Moment(output + w.H * cut, after_row(inputs, w)),
    ]
    if sides:
        moments[1:1] = [Moment(others + part.Q + part.K + 3 * (part.Q + part.X))]
        moments[-1:-1] = [Moment(others + 3 * part.Q + part.E)]
    return moments


def _resident(inputs: PlanInputs, w: Widths, part: Widths) -> float:
    """Beside the gradients while the second half goes backward: attention's output, and what it read where that was made for it."""
    sides, cut = inputs.layout.ulysses > 1, inputs.in_pieces
    if _stored(inputs):
        return w.Q * cut
    if inputs.policy.head_groups > 1:
        return w.Q + w.E
    return _read(inputs, w) + w.Q + w.E + w.Q * sides


def _read(inputs: PlanInputs, w: Widths) -> float:
    """Queries, keys and values as attention reads them in backward, where they are not the stored ones themselves."""
    if inputs.layout.ulysses > 1:
        return w.Q + w.X
    return w.Q * (inputs.in_pieces or is_made(inputs, QUERY)) + w.K * (inputs.in_pieces or is_made(inputs, KEY_VALUE))


def _attention_backward(inputs: PlanInputs, w: Widths, part: Widths) -> list[Moment]:
    sides, cut, groups = inputs.layout.ulysses > 1, inputs.in_pieces, inputs.policy.head_groups > 1
    wide = w.wide if inputs.layout.ring > 1 or _windows(inputs) else 1.0
    ring = (3 * w.X + 2 * w.wide * w.X + w.Q + w.X) if inputs.layout.ring > 1 else 0
    output = w.Q * (cut or not _stored(inputs)) * (sides or groups or _stored(inputs))
    # Of a group of heads: log-sum-exp of all, and the gradients of the group before.
    both = w.H + w.Q + output + (w.E + part.Q + part.X) * groups
    # Of documents in one pack, those of the last two are made beside those of all.
    gradients = (wide + inputs.packed) * (part.Q + part.X) + attention_workspace(inputs, part)
    if groups:
        kernel = Moment(both + _read(inputs, part) + (2 + 2 * sides) * part.Q + gradients)
    elif _stored(inputs):
        kernel = Moment(both + _read(inputs, w) + 2 * w.Q * sides + gradients + ring)
    else:
        kernel = Moment(both + _read(inputs, w) + w.Q + w.E + w.Q * sides + gradients + ring)
    made = part.Q + part.K
    projected = [Moment(both + made * cut, before_row(inputs, part))] * (groups or _stored(inputs))
    if not sides:
        return [kernel, *projected]
    projected += [Moment(both + made + 3 * (part.Q + part.X))] * (groups or _stored(inputs))
    return [kernel, *projected, Moment(both + (wide + 2) * (part.Q + part.X))]


def chunked_moments(inputs: PlanInputs) -> dict[Phase, list[Moment]]:
    """memory/executor/attention_chunked.py: of all rows only keys and values, their float32 gradients, and the layer's gradient."""
    w, sides = Widths.of(inputs), inputs.layout.ulysses > 1
    own = 0 if is_kept(inputs, LAYER_INPUT) else w.H
    totals = w.wide * w.X
    keys = w.X if sides else w.K * (inputs.in_pieces or is_made(inputs, KEY_VALUE))
    kept = w.K * is_kept(inputs, KEY_VALUE) * (not sides)
    query, output = w.Q * is_made(inputs, QUERY), (w.Q + w.E) * is_made(inputs, ATTENTION_OUTPUT)
    project = [Moment(w.K + 3 * w.X * sides, before_row(inputs, w))]
    attention = w.Q + w.K + 3 * w.Q + w.E + w.wide * 2 * w.Q
    forward = [*project, Moment(w.X + w.H, attention), Moment(w.X + w.H, w.Q + w.K + w.Q + after_row(inputs, w))]
    chunk = query + output
    return {
        Phase.FORWARD: [Moment(own - kept + m.whole, m.piece) for m in forward],
        Phase.SEGMENT: [Moment(own + w.H - kept + m.whole, m.piece) for m in forward] if inputs.segment_layers > 1 else [Moment(0)],
        Phase.BACKWARD_MLP: [
            *(Moment(w.H + m.whole, m.piece) for m in project),
            *after_backward(inputs, w, w.H + keys + totals, chunk + w.Q * sides),
        ],
        Phase.BACKWARD_ATTENTION: [
            Moment(w.H + keys + totals, chunk + w.H + (2 + w.wide + 2 * sides) * w.Q + 4 * w.X + attention_workspace(inputs, w, 4))
        ],
        Phase.BACKWARD_PROJECTIONS: [
            Moment(w.H + keys + totals, w.H + w.Q + w.K + before_backward_row(inputs, w)),
            *([Moment(w.H + totals + 3 * w.X)] if sides else []),
        ],
        Phase.LAYER_REDUCE: [Moment(w.H)],
        Phase.LOSS: [Moment(w.H)],
    }


def graph_moments(inputs: PlanInputs) -> dict[Phase, list[Moment]]:
    """memory/executor/kept_graph.py: both halves' graphs, each freed before the next is used."""
    w, saved = Widths.of(inputs), graph_row(inputs)
    sides = inputs.layout.ulysses > 1
    read = w.Q + w.X
    before = w.norm + w.Q + w.K + head_norms(inputs)
    resident = before + read * sides + w.Q * (1 + sides) + w.E
    return {
        Phase.FORWARD: [Moment(saved + 2 * w.H)],
        Phase.LOSS: [Moment(w.H)],
        Phase.BACKWARD_MLP: [
            *([Moment(saved + w.H + 2 * w.F + w.H * inputs.adapter.dora)] * _has_dense(inputs)),
            *([] if inputs.spec.experts is None else mixture_graph_backward(inputs, inputs.spec.experts, saved + w.H)),
        ],
        Phase.BACKWARD_ATTENTION: [
            Moment(resident + 2 * w.H + w.Q * (1 + sides) + (1 + inputs.packed) * read + attention_workspace(inputs, w))
        ],
        Phase.BACKWARD_PROJECTIONS: [Moment(before + 2 * w.H + w.Q + w.K + 2 * w.Q)],
        Phase.LAYER_REDUCE: [Moment(w.H)],
    }


def before_row(inputs: PlanInputs, w: Widths) -> float:
    """First norm, projections and rotation, no graph: queries as projected, turned, and the parts of the turn."""
    w = _all_heads(inputs, w)
    turn = w.wide if inputs.spec.wide_rotation else 1.0
    return w.H + max((1 + 3 * turn) * w.Q, 2 * w.Q + (1 + 1.5 * turn) * w.K)


def _all_heads(inputs: PlanInputs, w: Widths) -> Widths:
    """The widths of one group of heads; of all of them, where a norm over all is made for each group."""
    return Widths.of(inputs) if inputs.spec.norm_of_all_heads else w


def after_row(inputs: PlanInputs, w: Widths) -> float:
    """Second half, no graph: the sum, gate and up, beside them activation and product, or product and output."""
    dense = is_made(inputs, GATE_UP) * 2 * w.F + max(2 * w.F, w.F + 2 * w.H)
    mixture = 0.0 if inputs.spec.experts is None else mixture_forward(inputs, inputs.spec.experts)
    return is_made(inputs, RESIDUAL) * w.R + max(mixture, dense * _has_dense(inputs))


def after_backward(inputs: PlanInputs, w: Widths, whole: float, piece: float = 0.0) -> list[Moment]:
    """Second half's backward, beside `whole` and `piece`: through the last product, then through gate and up and their norm.

    The last product: activation, the product's gradient and its two factors', beside the layer's output. The norm: gate's and
    up's gradients and their weights' beside its own work.
    """
    # A magnitude's gradient needs its product's values (model/adapters/dora.py): of gate, up and projections where less is beside them.
    values = w.H * inputs.adapter.dora
    total = piece + w.R * is_made(inputs, RESIDUAL) + 2 * (w.R - w.H)
    mixture = [] if inputs.spec.experts is None else mixture_backward(inputs, inputs.spec.experts, whole, total)
    # The gradients of gate's and of up's rows in one matrix are as large as that matrix each.
    weight = inputs.width * inputs.spec.hidden_size * inputs.spec.intermediate_size * inputs.trains_all * (1 + inputs.spec.fused_gate_up)
    ended = w.H * inputs.spec.ends_with_norms  # the last product, which the norm behind it reads
    dense = [
        Moment(whole, total + 2 * w.F * is_made(inputs, GATE_UP) + 4 * w.F + w.H + values + ended),
        Moment(whole, total + 2 * w.F + norm_backward(inputs, inputs.spec.hidden_size), weight * (1 if inputs.in_pieces else 2)),
    ]
    return [*mixture, *(dense * _has_dense(inputs))]


def _has_dense(inputs: PlanInputs) -> bool:
    """Whether some feed-forward is dense."""
    return inputs.spec.experts is None or bool(inputs.spec.dense_layers)


def before_backward_row(inputs: PlanInputs, w: Widths) -> float:
    """Projections' backward: the norm's graph, the turn's parts, and their gradients; or beside the norms of each head."""
    w = _all_heads(inputs, w)
    turn = 5 * w.Q * (w.wide if inputs.spec.wide_rotation else 1.0) + w.K / 2 + w.H
    heads = (w.Q + w.K / 2 + 2 * w.H + norm_backward(inputs, w.Q // inputs.width)) * inputs.spec.qk_norm
    return w.norm + max(turn, heads)


def head_norms(inputs: PlanInputs) -> int:
    """What norms of each head's queries and keys leave in a graph."""
    return norm_bytes(inputs) * (inputs.spec.query_size + inputs.spec.kv_size) * inputs.spec.qk_norm


def _windows(inputs: PlanInputs) -> bool:
    return inputs.spec.windows.count(None) < len(inputs.spec.windows)


def _stored(inputs: PlanInputs) -> bool:
    return inputs.policy.attention_output.complete

"""The layer that runs, and the loss after the last: rows of all tokens, and one piece of them at a time. Pure.

The formulas follow memory/{local,whole,streamed,graph}.py, training/loss.py and parallel/sequence/{ulysses,ring}.py, moment by
moment: a phase holds the most that one of its moments does. Legend, bytes of one row: H hidden, Q queries, K keys and values,
X keys and values between the exchanges, F feed-forward, E log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

from .setting import Phase, Setting, Term
from .terms_activations import graph_row, norm_bytes


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes of each of the rank's rows, and of each row of the one piece that is worked on."""

    whole: float
    piece: float = 0.0


@dataclass(frozen=True, slots=True)
class Widths:
    """Of one row, by the legend; `norm`: what a norm's graph holds."""

    H: int
    Q: int
    K: int
    X: int
    F: int
    E: int
    norm: int
    wide: float
    """Bytes of a number in accumulations, over one in computation."""

    @classmethod
    def of(cls, s: Setting) -> Widths:
        spec, width = s.spec, s.width
        keys = 2 * width * spec.kv_size
        return cls(
            H=width * spec.hidden_size, Q=width * spec.query_size, K=keys, X=keys * s.kv_copies, F=width * spec.intermediate_size,
            E=s.master * spec.num_heads, norm=norm_bytes(s) * spec.hidden_size, wide=s.master / s.width,
        )  # fmt: skip


def layer_rows(s: Setting) -> tuple[Term, Term]:
    """What the live layer holds of all rows, and of one piece."""
    moments = graph_moments(s) if s.policy.graph else streamed_moments(s) if s.by_chunks else whole_moments(s)
    largest = {
        phase: max(found, key=lambda moment: moment.whole * s.tokens + moment.piece * s.piece_tokens) for phase, found in moments.items()
    }
    whole = {phase: int(moment.whole * s.tokens) for phase, moment in largest.items()}
    piece = {phase: int(moment.piece * s.piece_tokens) for phase, moment in largest.items()}
    note = "everything between its ends" if not s.in_pieces else f"{s.piece_tokens} tokens of everything between its ends"
    return (
        Term("live layer, all rows", f"what attention reads and makes, heads over {s.layout.ulysses}, ring of {s.layout.ring}", whole),
        Term("live layer, a piece", note, piece),
    )


def whole_moments(s: Setting) -> dict[Phase, list[Moment]]:
    """memory/whole.py: attention over all rows at once."""
    w, cut = Widths.of(s), s.in_pieces
    own = 0 if _kept(s, "layer_input") else w.H
    sides = s.layout.ulysses > 1
    read = w.Q + w.X
    forward = _forward_moments(s, w)
    # What attention read and made, and its output on the other side of the exchange.
    held = read + w.Q + w.E + w.Q * sides
    return {
        Phase.FORWARD: [Moment(own + m.whole, m.piece) for m in forward],
        Phase.SEGMENT: [Moment(own + w.H + m.whole, m.piece) for m in forward] if s.segment_layers > 1 else [Moment(0)],
        Phase.BACKWARD_MLP: [
            *(Moment(w.H + m.whole, m.piece) for m in forward[:-1]),
            Moment(held + w.H + w.Q * cut, after_backward_row(s, w)),
        ],
        Phase.BACKWARD_ATTENTION: _attention_backward(s, w, held),
        Phase.BACKWARD_PROJECTIONS: [Moment(w.H + w.Q + w.K, before_backward_row(s, w))],
        Phase.LAYER_REDUCE: [Moment(w.H)],
        Phase.LOSS: [Moment(w.H)],
    }


def _forward_moments(s: Setting, w: Widths) -> list[Moment]:
    """Projections, the exchange, attention, the exchange back, and the second half."""
    cut, sides, read = s.in_pieces, s.layout.ulysses > 1, w.Q + w.X
    ring = 3 * w.X + w.wide * w.Q if s.layout.ring > 1 else 0
    moments = [
        Moment((w.Q + w.K) * cut, before_row(w)),
        Moment(read + w.Q + w.E + ring),
        Moment(w.Q + w.E + w.H * cut, after_row(w)),
    ]
    if sides:
        moments[1:1] = [Moment(w.Q + w.K + 3 * read)]
        moments[-1:-1] = [Moment(3 * w.Q + w.E)]
    return moments


def _attention_backward(s: Setting, w: Widths, held: float) -> list[Moment]:
    read, sides = w.Q + w.X, s.layout.ulysses > 1
    wide = w.wide if s.layout.ring > 1 else 1.0
    ring = (3 * w.X + 2 * w.wide * w.X + read) if s.layout.ring > 1 else 0
    kernel = Moment(w.H + w.Q * (1 + sides) + held + wide * read + ring)
    if not sides:
        return [kernel]
    return [kernel, Moment(w.H + 2 * w.Q + (wide + 2) * read + w.Q + w.K)]


def streamed_moments(s: Setting) -> dict[Phase, list[Moment]]:
    """memory/streamed.py: of all rows only keys and values, their float32 gradients, and the layer's gradient."""
    w, sides = Widths.of(s), s.layout.ulysses > 1
    own = 0 if _kept(s, "layer_input") else w.H
    totals = w.wide * w.X
    attention = 2 * w.Q + w.E + w.wide * 2 * w.Q + w.Q
    keys = [Moment(w.K + 3 * w.X * sides, before_row(w))]
    forward = [*keys, Moment(w.X + w.H, w.Q + w.K + attention), Moment(w.X + w.H, w.Q + w.K + w.Q + after_row(w))]
    return {
        Phase.FORWARD: [Moment(own + m.whole, m.piece) for m in forward],
        Phase.SEGMENT: [Moment(own + w.H + m.whole, m.piece) for m in forward] if s.segment_layers > 1 else [Moment(0)],
        Phase.BACKWARD_MLP: [
            *(Moment(w.H + m.whole, m.piece) for m in keys),
            Moment(w.H + w.X + totals, 2 * w.Q + w.E + after_backward_row(s, w)),
        ],
        Phase.BACKWARD_ATTENTION: [Moment(w.H + w.X + totals, 3 * w.Q + w.E + w.H + w.wide * w.Q + w.Q + 4 * w.X)],
        Phase.BACKWARD_PROJECTIONS: [
            Moment(w.H + w.X + totals, w.H + w.Q + w.K + before_backward_row(s, w)),
            *([Moment(w.H + totals + 3 * w.X)] if sides else []),
        ],
        Phase.LAYER_REDUCE: [Moment(w.H)],
        Phase.LOSS: [Moment(w.H)],
    }


def graph_moments(s: Setting) -> dict[Phase, list[Moment]]:
    """memory/graph.py: both halves' graphs, each freed before the next is used."""
    w, saved = Widths.of(s), graph_row(s)
    sides = s.layout.ulysses > 1
    read = w.Q + w.X
    before = norm_bytes(s) * s.spec.hidden_size + w.Q + w.K + norm_bytes(s) * (s.spec.query_size + s.spec.kv_size) * s.spec.qk_norm
    held = before + read * sides + w.Q * (1 + sides) + w.E
    return {
        Phase.FORWARD: [Moment(saved + 2 * w.H)],
        Phase.LOSS: [Moment(w.H)],
        Phase.BACKWARD_MLP: [Moment(saved + w.H + 2 * w.F)],
        Phase.BACKWARD_ATTENTION: [Moment(held + 2 * w.H + w.Q * (1 + sides) + read)],
        Phase.BACKWARD_PROJECTIONS: [Moment(before + 2 * w.H + w.Q + w.K + 2 * w.Q)],
        Phase.LAYER_REDUCE: [Moment(w.H)],
    }


def before_row(w: Widths) -> float:
    """First norm, projections and rotation, no graph: queries as projected, turned, and the parts of the turn."""
    return w.H + max(4 * w.Q, 2 * w.Q + 2.5 * w.K)


def after_row(w: Widths) -> float:
    """Second half, no graph: gate, up, activation and product beside the sum."""
    return max(4 * w.F + w.H, 3 * w.F + 3 * w.H)


def after_backward_row(s: Setting, w: Widths) -> float:
    """Second half's backward: gate, up, the products' gradient, and three more while they are taken apart; sum and output beside."""
    return 6 * w.F + 2 * w.H


def before_backward_row(s: Setting, w: Widths) -> float:
    """Projections' backward: the norm's graph, the turn's parts, and their gradients."""
    return w.norm + w.Q + w.K / 2 + 3 * w.Q


def _kept(s: Setting, name: str) -> bool:
    """Whether all of a class stays on the device, so that the live layer's is counted there."""
    return s.policy.splits[name].keep >= 1.0


def loss_chunk(s: Setting) -> Term:
    """Logits of one chunk in compute precision and in float32; of the chunk before too; or beside them a part of the head's gradient."""
    chunk, words = min(s.train.loss_chunk_tokens, s.tokens), s.spec.vocab_size
    logits = s.master * words * chunk
    narrow = s.width * words * chunk * (s.width < s.master)
    part = s.width * words * s.spec.hidden_size
    most = max(2 * logits + narrow, logits + narrow + part)
    rows = chunk * s.spec.hidden_size * (norm_bytes(s) + s.width)
    return Term("loss chunk", f"logits of {chunk} tokens x {words}", {Phase.LOSS: most + rows})

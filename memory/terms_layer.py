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
    def of(cls, s: Setting, groups: int = 1) -> Widths:
        """`groups`: Q, K, X and E of one of so many groups of heads."""
        spec, width = s.spec, s.width
        heads = max(1, -(-spec.num_kv_heads // groups))
        keys = 2 * width * heads * spec.head_dim
        return cls(
            H=width * spec.hidden_size, Q=width * spec.query_size // groups, K=keys, X=keys * s.kv_copies,
            F=width * spec.intermediate_size, E=s.master * spec.num_heads // groups, norm=norm_bytes(s) * spec.hidden_size,
            wide=s.master / s.width,
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
    """memory/whole.py: attention over all rows at once, or over groups of heads one after the other."""
    w, part = Widths.of(s), Widths.of(s, s.policy.head_groups)
    own = 0 if _kept(s, "layer_input") else w.H
    forward = _forward_moments(s, w, part)
    projected = [Moment(w.H + w.Q * s.in_pieces * _stored(s) + m.whole, m.piece) for m in forward[:-1]]
    return {
        Phase.FORWARD: [Moment(own + m.whole, m.piece) for m in forward],
        Phase.SEGMENT: [Moment(own + w.H + m.whole, m.piece) for m in forward] if s.segment_layers > 1 else [Moment(0)],
        Phase.BACKWARD_MLP: [*projected, Moment(_held(s, w, part) + w.H + w.Q * s.in_pieces, after_backward_row(s, w))],
        Phase.BACKWARD_ATTENTION: _attention_backward(s, w, part),
        Phase.BACKWARD_PROJECTIONS: [
            Moment(w.H + part.Q + part.K + (2 * w.Q + w.E) * (s.policy.head_groups > 1), before_backward_row(s, part))
        ],
        Phase.LAYER_REDUCE: [Moment(w.H)],
        Phase.LOSS: [Moment(w.H)],
    }


def _forward_moments(s: Setting, w: Widths, part: Widths) -> list[Moment]:
    """Projections, the exchange, attention, the exchange back, and the second half; what stays with this layer is not counted twice."""
    cut, sides, groups = s.in_pieces, s.layout.ulysses > 1, s.policy.head_groups > 1
    made = part.Q * (not _kept(s, "query")) + part.K * (not _kept(s, "key_value"))
    read = part.Q + part.X if sides else made
    ring = 3 * w.X + w.wide * w.Q if s.layout.ring > 1 else 0
    output = (w.Q + w.E) * (not _kept(s, "attention_output"))
    others = output * groups
    moments = [
        Moment(others + made * cut, before_row(part)),
        Moment(others + read + (part.Q + part.E if groups else output) + ring),
        Moment(output + w.H * cut, after_row(s, w)),
    ]
    if sides:
        moments[1:1] = [Moment(others + part.Q + part.K + 3 * (part.Q + part.X))]
        moments[-1:-1] = [Moment(others + 3 * part.Q + part.E)]
    return moments


def _held(s: Setting, w: Widths, part: Widths) -> float:
    """Beside the gradients while the second half goes backward: attention's output, and what it read where that was made for it."""
    sides, cut = s.layout.ulysses > 1, s.in_pieces
    if _stored(s):
        return w.Q * cut
    if s.policy.head_groups > 1:
        return w.Q + w.E
    return _read(s, w) + w.Q + w.E + w.Q * sides


def _read(s: Setting, w: Widths) -> float:
    """Queries, keys and values as attention reads them in backward, where they are not the stored ones themselves."""
    if s.layout.ulysses > 1:
        return w.Q + w.X
    return w.Q * (s.in_pieces or _made(s, "query")) + w.K * (s.in_pieces or _made(s, "key_value"))


def _attention_backward(s: Setting, w: Widths, part: Widths) -> list[Moment]:
    sides, cut, groups = s.layout.ulysses > 1, s.in_pieces, s.policy.head_groups > 1
    wide = w.wide if s.layout.ring > 1 else 1.0
    ring = (3 * w.X + 2 * w.wide * w.X + w.Q + w.X) if s.layout.ring > 1 else 0
    output = w.Q * (cut or not _stored(s)) * (sides or groups or _stored(s))
    both = w.H + w.Q + output
    gradients = wide * (part.Q + part.X)
    if groups:
        # Of one group: what attention reads, its output, and its gradient, each on both sides.
        sent = (2 + 2 * sides) * part.Q
        kernel = Moment(both + w.E + _read(s, part) + sent + gradients)
    elif _stored(s):
        kernel = Moment(both + _read(s, w) + 2 * w.Q * sides + gradients + ring)
    else:
        kernel = Moment(both + _read(s, w) + w.Q + w.E + w.Q * sides + gradients + ring)
    if not sides:
        return [kernel]
    return [kernel, Moment(both + w.E * groups + (wide + 2) * (part.Q + part.X))]


def streamed_moments(s: Setting) -> dict[Phase, list[Moment]]:
    """memory/streamed.py: of all rows only keys and values, their float32 gradients, and the layer's gradient."""
    w, sides = Widths.of(s), s.layout.ulysses > 1
    own = 0 if _kept(s, "layer_input") else w.H
    totals = w.wide * w.X
    keys = w.X if sides else w.K * (s.in_pieces or _made(s, "key_value"))
    kept = w.K * _kept(s, "key_value") * (not sides)
    query, output = w.Q * _made(s, "query"), (w.Q + w.E) * _made(s, "attention_output")
    project = [Moment(w.K + 3 * w.X * sides, before_row(w))]
    attention = w.Q + w.K + 3 * w.Q + w.E + w.wide * 2 * w.Q
    forward = [*project, Moment(w.X + w.H, attention), Moment(w.X + w.H, w.Q + w.K + w.Q + after_row(s, w))]
    chunk = query + output
    return {
        Phase.FORWARD: [Moment(own - kept + m.whole, m.piece) for m in forward],
        Phase.SEGMENT: [Moment(own + w.H - kept + m.whole, m.piece) for m in forward] if s.segment_layers > 1 else [Moment(0)],
        Phase.BACKWARD_MLP: [
            *(Moment(w.H + m.whole, m.piece) for m in project),
            Moment(w.H + keys + totals, chunk + w.Q * sides + after_backward_row(s, w)),
        ],
        Phase.BACKWARD_ATTENTION: [Moment(w.H + keys + totals, chunk + w.Q + w.H + w.wide * w.Q + w.Q + 4 * w.X + 2 * w.Q * sides)],
        Phase.BACKWARD_PROJECTIONS: [
            Moment(w.H + keys + totals, w.H + w.Q + w.K + before_backward_row(s, w)),
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
    before = w.norm + w.Q + w.K + head_norms(s)
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


def after_row(s: Setting, w: Widths) -> float:
    """Second half, no graph: the sum, gate and up, beside them activation and product, or product and output."""
    return _made(s, "residual") * w.H + _made(s, "mlp") * 2 * w.F + max(2 * w.F, w.F + 2 * w.H)


def after_backward_row(s: Setting, w: Widths) -> float:
    """Second half's backward. The last product: activation, the product's gradient and two of its factors' beside the output.

    Gate and up: their gradients beside the norm's backward, which is in float32.
    """
    total = w.H * _made(s, "residual")
    product = total + 2 * w.F * _made(s, "mlp") + 4 * w.F + w.H
    norm = total + 2 * w.F + 6 * max(4, w.H // s.spec.hidden_size) * s.spec.hidden_size
    return max(product, norm)


def before_backward_row(s: Setting, w: Widths) -> float:
    """Projections' backward: the norm's graph, the turn's parts, and their gradients."""
    return w.norm + w.Q + w.K / 2 + 3 * w.Q + head_norms(s)


def head_norms(s: Setting) -> int:
    """What norms of each head's queries and keys leave in a graph."""
    return norm_bytes(s) * (s.spec.query_size + s.spec.kv_size) * s.spec.qk_norm


def masked_scores(s: Setting) -> Term:
    """Kernels without the mask that is needed make scores of MASKED_QUERY_CHUNK queries in float32 (parallel/sequence/attention.py)."""
    from ..training.config import Family

    softcap = s.spec.family is Family.GEMMA2
    windows = [window for window in s.spec.windows if window is not None]
    if s.on_gpu and s.width == 2:
        return Term("masked scores", "", {})
    if not (softcap or windows or s.on_gpu):
        return Term("masked scores", "", {})
    length = min(s.data.max_seq_len, s.tokens * s.layout.sp_degree)
    full = (softcap and len(windows) < s.spec.num_layers) or s.on_gpu
    keys = length if full else min(length, max(windows) + MASKED_QUERY_CHUNK)
    queries = min(MASKED_QUERY_CHUNK, length)
    one = s.master * s.spec.num_heads // s.layout.ulysses * queries * keys
    forward, backward = (5, 8) if softcap else (4, 5.25)
    held = {Phase.FORWARD: int(forward * one), Phase.SEGMENT: int(forward * one), Phase.BACKWARD_ATTENTION: int(backward * one)}
    return Term("masked scores", f"{queries} queries x {keys} keys of each head, in float32", held)


MASKED_QUERY_CHUNK = 512
"""Of parallel/sequence/attention.py."""


def _kept(s: Setting, name: str) -> bool:
    """Whether all of a class stays on the device, so that the live layer's is counted there."""
    return s.policy.splits[name].keep >= 1.0


def _made(s: Setting, name: str) -> bool:
    """Whether rows of a class are made in backward; else they are the kept ones or those that came back from the host."""
    return not s.policy.splits[name].complete


def _stored(s: Setting) -> bool:
    return s.policy.attention_output.complete


def loss_chunk(s: Setting) -> Term:
    """Logits of one chunk in compute precision and in float32; of the chunk before too; or beside them a part of the head's gradient."""
    chunk, words = min(s.train.loss_chunk_tokens, s.tokens), s.spec.vocab_size
    logits = s.master * words * chunk
    narrow = s.width * words * chunk * (s.width < s.master)
    part = s.width * words * s.spec.hidden_size
    most = max(2 * logits + narrow, logits + narrow + part)
    rows = chunk * s.spec.hidden_size * (norm_bytes(s) + s.width)
    return Term("loss chunk", f"logits of {chunk} tokens x {words}", {Phase.LOSS: most + rows})

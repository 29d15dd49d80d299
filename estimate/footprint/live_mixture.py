"""The second half of a layer that is a mixture of experts, while it runs: rows, and gradients of its weights. Pure.

The formulas follow memory/executor/{mixture,experts,expert_chunks,grouped}.py and parallel/expert_exchange.py, moment by moment.

Legend, bytes of one token: H hidden, R hidden of each of its experts, B the same of the rows whose experts are here, A gate (or up) of
those, G gate and up with the shared expert's, S gate of that.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...memory.activation_classes import EXPERT_GATE_UP, ExpertSizes
from ...parallel.experts.layer_order import LayerOrder
from ..plan_inputs import PlanInputs
from ..timing.expert_order import expert_order
from .moment import Moment, is_made, norm_backward


@dataclass(frozen=True, slots=True)
class _Widths:
    H: int
    R: int
    B: float
    A: float
    G: float
    S: int
    base: int
    """Normed rows, logits, and the routing's places."""
    weighed: int
    """What the graph of the weights holds."""
    wide: int
    """A hidden vector in the precision of accumulations."""
    one: int
    """Bytes of one of the three matrices of all experts that are here, as gradients."""
    sent: float
    """Rows on their way: those that leave, and those that came before they are put in order. Nothing where all experts are here."""
    held: float
    """Rows that came here and stay for the gradients of weights; those that are here are gathered again."""
    order: LayerOrder
    """How chunks of rows are taken."""
    sums: float
    """Bytes of gradients of all experts that are here, as chunks add to them, and beside them of what the kernel makes of one chunk."""

    @classmethod
    def of(cls, inputs: PlanInputs, experts: ExpertSizes) -> _Widths:
        width, hidden, chosen = inputs.width, inputs.spec.hidden_size, experts.per_token
        wide = experts.has_wide_router and inputs.master > width
        logits, spread = (inputs.master if wide else width) * experts.num_experts, inputs.expert_parallel > 1
        rows = width * hidden * chosen * inputs.row_share
        order, here = expert_order(inputs).order, experts.num_experts // inputs.expert_parallel
        one = width * here * experts.inner_size * hidden
        return cls(
            H=width * hidden,
            R=width * hidden * chosen,
            B=rows,
            A=width * chosen * experts.inner_size * inputs.row_share,
            G=2 * width * (chosen * experts.inner_size * inputs.row_share + experts.shared_size),
            S=width * experts.shared_size,
            base=width * hidden + inputs.master * hidden * wide + logits + 16 * chosen,
            weighed=inputs.master * (experts.num_experts + 3 * chosen) + 8 * chosen,
            wide=inputs.master * hidden,
            one=one,
            sent=(width * hidden * chosen + rows) * spread,
            held=rows * spread,
            order=order,
            sums=one * _sums_of_chunks(inputs, order.backward.degree, here),
        )


def mixture_forward(inputs: PlanInputs, experts: ExpertSizes) -> float:
    """Bytes of one row without a graph, beside the sum after attention: gate and up from gathered rows, or the output from products."""
    w = _Widths.of(inputs, experts)
    stay = w.base + w.G * is_made(inputs, EXPERT_GATE_UP) + inputs.master * experts.per_token
    # All chunks are sent before the first is waited for, and results of some leave while others come.
    chunked = w.sent + w.B + (4 * w.A + w.B) / w.order.forward.degree if not w.order.is_plain else 0.0
    return stay + max(
        chunked, w.B + w.sent, 2 * w.A, w.A + w.B, w.B + w.sent, w.R + 2 * w.wide + w.H, 2 * w.H + max(2 * w.S, w.S + w.H) * (w.S > 0)
    )


def mixture_backward(inputs: PlanInputs, experts: ExpertSizes, whole: float, piece: float) -> list[Moment]:
    """Moments of the backward beside `whole` and `piece`, gate and up made or stored; then the norm's and the router's."""
    w = _Widths.of(inputs, experts)
    gate_up = w.G * is_made(inputs, EXPERT_GATE_UP)
    moments = _experts_backward(w, piece + w.base + w.weighed + gate_up + w.held)
    router = piece + w.base + 2 * w.H + w.weighed + norm_backward(inputs, inputs.spec.hidden_size)
    return [Moment(whole, rows, fixed) for rows, fixed in [*moments, (router, 3 * w.one * (not inputs.in_pieces))]]


def mixture_graph_backward(inputs: PlanInputs, experts: ExpertSizes, whole: float) -> list[Moment]:
    """Moments of the backward where autograd's graph of the half is there."""
    return [Moment(whole + rows, 0.0, fixed) for rows, fixed in _experts_backward(_Widths.of(inputs, experts), 0.0)]


def _experts_backward(w: _Widths, stay: float) -> list[tuple[float, float]]:
    """Bytes of a row and of weights' gradients: through the last product, the activation, the first product, and the sums of rows."""
    return [
        *_chunks_backward(w, stay),
        (stay + w.B + w.sent, 0.0),
        (stay + w.B + 4 * w.A, 0.0),
        (stay + w.B + 3 * w.A, w.one),
        (stay + 6 * w.A, w.one),
        (stay + 2 * w.A + w.B + w.sent, 3 * w.one),
        (stay + 2 * w.A + w.R + w.wide + w.H, 3 * w.one),
    ]


def _chunks_backward(w: _Widths, stay: float) -> list[tuple[float, float]]:
    """The last chunk's gradients while all others' are on their way, beside what deferred weight gradients are made of."""
    if w.order.is_plain:
        return []
    backward = w.order.backward
    deferred = (w.B + 3 * w.A) * backward.defers_weights
    return [(stay + deferred + w.B + w.sent + (2 * w.B + 6 * w.A) / backward.degree, w.sums)]


def _sums_of_chunks(inputs: PlanInputs, degree: int, here: int) -> float:
    """`_Widths.sums` over one matrix of the `here` experts of a rank."""
    cut = here % degree > 0
    most = min(here, -(-here // degree) + cut)
    # Chunks that cut experts are summed in the precision of accumulations, of products made apart, and rounded one matrix at a time.
    totals = 3 * (inputs.master / inputs.width if cut else 1)
    return totals + 2 * most / here * (cut or (inputs.on_gpu and degree > 1))

"""What a layer holds at one moment, and the widths it is counted in. Pure.

Legend, bytes of one row: H hidden, R the sum after attention, Q queries, K keys and values, X keys and values between the exchanges,
F feed-forward, E log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...memory.activation_classes import ActivationClass
from ..plan_inputs import PlanInputs
from .activations import norm_bytes


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes of each of the rank's rows, of each row of the one piece that is worked on, and whatever the rows."""

    whole: float
    piece: float = 0.0
    fixed: float = 0.0


@dataclass(frozen=True, slots=True)
class Widths:
    """Numbers of one row, by the legend; `norm`: what a norm's graph holds."""

    H: int
    R: int
    Q: int
    K: int
    X: int
    F: int
    E: int
    norm: int
    wide: float
    """Bytes of a number in accumulations, over one in computation."""

    @classmethod
    def of(cls, inputs: PlanInputs, groups: int = 1) -> Widths:
        """`groups`: Q, K, X and E of one of so many groups of heads (memory/heads.py)."""
        spec, width, ulysses = inputs.spec, inputs.width, inputs.layout.ulysses
        share = spec.num_heads // spec.num_kv_heads
        heads = ulysses * max(1, -(-spec.num_heads // (ulysses * groups * share))) if groups > 1 else spec.num_kv_heads * inputs.kv_copies
        keys = 2 * width * spec.head_dim
        return cls(
            H=width * spec.hidden_size, R=width * spec.residual_size,
            Q=width * spec.query_size // groups, K=keys * min(heads, spec.num_kv_heads), X=keys * heads,
            F=width * spec.intermediate_size, E=inputs.master * spec.num_heads // groups, norm=norm_bytes(inputs) * spec.hidden_size,
            wide=inputs.master / inputs.width,
        )  # fmt: skip


def is_kept(inputs: PlanInputs, kind: ActivationClass) -> bool:
    """Whether all of a class stays on the device, so that the live layer's is counted there."""
    return inputs.policy.split(kind).keep >= 1.0


def is_made(inputs: PlanInputs, kind: ActivationClass) -> bool:
    """Whether rows of a class are made in backward; else they are the kept ones or those that came back from the host."""
    return not inputs.policy.split(kind).complete


def norm_backward(inputs: PlanInputs, size: int) -> int:
    """Bytes that the backward of an RMS norm of `size` numbers works with, in float32 at least."""
    return 6 * inputs.master * size

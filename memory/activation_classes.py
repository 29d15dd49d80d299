"""The classes of activations of a decoder layer: what each holds, how wide it is, what making it again costs, what it is made from. Pure.

The one table behind policies, the executor, the order of its reads, bytes, traffic and FLOPs: all of them go through
`activation_classes` and ask a class, so that another kind of layer is another row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Sizes of the mixture of experts of a decoder layer."""

    num_experts: int
    per_token: int
    """Experts that one token visits."""
    inner_size: int
    """Width of one expert's gate, and of its up."""
    shared_size: int = 0
    """The same of the expert that all tokens visit; 0: there is none."""
    has_router_bias: bool = False
    has_biases: bool = False
    """Whether the experts' own projections have biases."""
    has_shared_gate: bool = False
    """Whether the shared expert's output is scaled token by token."""
    has_correction_bias: bool = False
    """Whether experts are chosen by scores to which a bias is added that no gradient reaches."""
    has_wide_router: bool = False
    """Whether logits are made in the precision of accumulations."""
    dense_size: int = 0
    """Width of the feed-forward of the layers without experts; 0: every layer has experts."""
    dense_share: float = 0.0
    """Share of the model's layers that have none."""

    @property
    def active_size(self) -> int:
        """Numbers of gate that one token makes, over all experts it visits."""
        return self.per_token * self.inner_size + self.shared_size

    @property
    def widest_size(self) -> int:
        """The same of the widest layer, with experts or without."""
        return max(self.active_size, self.dense_size)

    @property
    def mean_size(self) -> float:
        """The same, the mean over the layers with experts and without."""
        return self.active_size + self.dense_share * (self.dense_size - self.active_size)


class LayerSizes(Protocol):
    """Widths of one decoder layer, as a model's spec has them."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def query_size(self) -> int: ...
    @property
    def kv_size(self) -> int: ...
    @property
    def residual_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def experts(self) -> ExpertSizes | None:
        """None: the feed-forward is dense."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """FLOPs of one token's forward through one whole layer."""

    linear: float
    attention: float
    """Scores and weighted values, the mean over a sequence's tokens."""


@dataclass(frozen=True, eq=False, slots=True)
class ActivationClass:
    """One kind of rows that a layer makes in forward and needs in backward: kept, moved to the host or recomputed."""

    name: str
    description: str
    numbers_per_token: Callable[[LayerSizes], int]
    """Numbers of one token in the precision of computation."""
    recompute_flops: Callable[[LayerSizes, ForwardFlops], float]
    """FLOPs of making one token's numbers from what the class is made from."""
    made_from: tuple[ActivationClass, ...] = ()
    """Classes it is made from, in the order they are read. Empty: the layer below made it."""
    wide_numbers_per_token: Callable[[LayerSizes], int] = lambda sizes: 0
    """Numbers of one token in the precision of accumulations, beside the others."""
    num_tensors: int = 1
    """Tensors of one piece."""
    by_token: bool = True
    """Any share of the tokens may be recomputed. Otherwise all of them or none, as `MemoryPolicy` says."""
    of_heads: bool = False
    """Rows of heads, which attention reads or makes: one group of heads after the other may do."""
    decision: bool = False
    """Made once and always kept, whatever the policy: recomputed it might come out otherwise, as the choice between near equals does."""


LAYER_INPUT = ActivationClass(
    name="layer_input",
    description="layer inputs",
    numbers_per_token=lambda sizes: sizes.hidden_size,
    # The layer below runs once more: what inner layers of a segment cost.
    recompute_flops=lambda sizes, forward: forward.linear + forward.attention,
    by_token=False,
)
QUERY = ActivationClass(
    name="query",
    description="queries",
    numbers_per_token=lambda sizes: sizes.query_size,
    recompute_flops=lambda sizes, forward: 2.0 * sizes.hidden_size * sizes.query_size,
    made_from=(LAYER_INPUT,),
    of_heads=True,
)
KEY_VALUE = ActivationClass(
    name="key_value",
    description="keys and values",
    numbers_per_token=lambda sizes: 2 * sizes.kv_size,
    recompute_flops=lambda sizes, forward: 4.0 * sizes.hidden_size * sizes.kv_size,
    made_from=(LAYER_INPUT,),
    num_tensors=2,
    of_heads=True,
)
ATTENTION_OUTPUT = ActivationClass(
    name="attention_output",
    description="attention outputs",
    numbers_per_token=lambda sizes: sizes.query_size,
    wide_numbers_per_token=lambda sizes: sizes.num_heads,  # the log-sum-exp of each head
    recompute_flops=lambda sizes, forward: forward.attention,
    made_from=(QUERY, KEY_VALUE),
    num_tensors=2,
    by_token=False,
    of_heads=True,
)
RESIDUAL = ActivationClass(
    name="residual",
    description="sums after attention",
    numbers_per_token=lambda sizes: sizes.residual_size,
    recompute_flops=lambda sizes, forward: 2.0 * sizes.hidden_size * sizes.query_size,
    made_from=(ATTENTION_OUTPUT, LAYER_INPUT),
)
GATE_UP = ActivationClass(
    name="mlp",
    description="gate and up",
    numbers_per_token=lambda sizes: 2 * sizes.intermediate_size,
    recompute_flops=lambda sizes, forward: 4.0 * sizes.hidden_size * sizes.intermediate_size,
    made_from=(RESIDUAL,),
    num_tensors=2,
)
ROUTING = ActivationClass(
    name="routing",
    description="experts chosen",
    numbers_per_token=lambda sizes: 0,
    # One int32 each.
    wide_numbers_per_token=lambda sizes: _experts(sizes).per_token,
    recompute_flops=lambda sizes, forward: 0.0,
    made_from=(RESIDUAL,),
    by_token=False,
    decision=True,
)
EXPERT_GATE_UP = ActivationClass(
    # One key of a policy for both kinds of feed-forward: it is the same part of a layer.
    name=GATE_UP.name,
    description="gate and up of each token's experts",
    # Bytes are those of the widest layer, work is that of the mean one.
    numbers_per_token=lambda sizes: 2 * _experts(sizes).widest_size,
    recompute_flops=lambda sizes, forward: 4.0 * sizes.hidden_size * _experts(sizes).mean_size,
    made_from=(RESIDUAL, ROUTING),
)


def _experts(sizes: LayerSizes) -> ExpertSizes:
    assert sizes.experts is not None, "a class of layers with experts"
    return sizes.experts


LOG_SUM_EXP = "log_sum_exp"
"""Key of what lies beside attention's output where that is stored by other pieces than attention made it in."""
COMMON = (LAYER_INPUT, QUERY, KEY_VALUE, ATTENTION_OUTPUT, RESIDUAL)
"""Classes of every decoder layer, in the order they are made; those of its feed-forward follow."""


@dataclass(frozen=True, slots=True)
class FeedForwardCosts:
    """What policies and estimates know of one kind of feed-forward (memory/executor/token_local.py: FeedForward)."""

    classes: tuple[ActivationClass, ...]
    output_flops: Callable[[LayerSizes], float]
    """FLOPs of one token's output from the last of the classes."""


DENSE = FeedForwardCosts(classes=(GATE_UP,), output_flops=lambda sizes: 2.0 * sizes.hidden_size * sizes.intermediate_size)
MIXTURE = FeedForwardCosts(
    classes=(ROUTING, EXPERT_GATE_UP), output_flops=lambda sizes: 2.0 * sizes.hidden_size * _experts(sizes).mean_size
)
CLASSES = (*COMMON, *DENSE.classes)
"""All classes a policy can speak of, by name: gate and up of experts are under the same."""


def feed_forward_costs(sizes: LayerSizes) -> FeedForwardCosts:
    """Those of a model's layers."""
    return DENSE if sizes.experts is None else MIXTURE


def activation_classes(sizes: LayerSizes) -> tuple[ActivationClass, ...]:
    """The classes of a model's layers, in the order they are made."""
    return (*COMMON, *feed_forward_costs(sizes).classes)


def after_attention(classes: Iterable[ActivationClass]) -> tuple[ActivationClass, ...]:
    """Those of the second half of a layer."""
    return tuple(kind for kind in classes if kind is RESIDUAL or RESIDUAL in _origins(kind))


def _origins(kind: ActivationClass) -> set[ActivationClass]:
    """All that a class comes from."""
    return {origin for source in kind.made_from for origin in (source, *_origins(source))}

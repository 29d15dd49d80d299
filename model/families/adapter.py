"""The protocol of a family's adapter: a decoder layer cut into two token-local halves around the attention core.

Legend: T local tokens, M model width, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from ...errors import ConfigError
from ...memory.executor.capacity import Capacity
from ...memory.executor.experts import ExpertRanks
from ...memory.executor.mixture import ExpertLoad
from ...memory.executor.router_losses import RouterLosses
from ...memory.executor.token_local import FeedForward, GradientSums, LayerSteps, NothingSaved, Step, pull_back
from ...memory.executor.weight_products import LayerProducts
from ...memory.heads import ALL_HEADS, HeadIndex, Heads
from ...parallel.experts.layer_order import LayerOrder
from ...parallel.sequence.attention import AttentionSpec
from ...parallel.sharding.parts import is_sharded, local
from .projection import Projection, check_modules, projection_of

Rope = tuple[Tensor, Tensor]
"""cos and sin, each (T, D)."""


class LayerAdapter(ABC):
    """Reads the modules of one Hugging Face decoder layer; owns no weights."""

    projections: tuple[str, ...]
    """Modules whose products the steps make (projection.py): their weights and biases are read, they are not called."""
    norms: tuple[str, ...]
    """Modules that the steps call."""
    own: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Modules of the family's own classes, by name: their parameters are read, they are not called."""
    sinks_name: ClassVar[str | None] = None
    """The parameter (H,) with a learnt logit of each query head that joins attention's softmax, where the family has one.

    Every parameter of the layer is this one, or one of a projection, of a norm or of `own`.
    """

    def __init__(self, layer: nn.Module) -> None:
        check_modules(layer, self.projections, self.norms, own=self.own, parameters=() if self.sinks_name is None else (self.sinks_name,))
        self.layer, self.attention = layer, layer.self_attn
        if float(getattr(self.attention, "attention_dropout", 0.0)) > 0:
            raise ConfigError(
                "model.extra.attention_dropout",
                found=str(self.attention.attention_dropout),
                expected="0: block-wise attention has no dropout",
                hint="model.extra.attention_dropout=0.0",
            )
        self.spec = self._spec()
        self._views: dict[str, Tensor] = {}
        self.expert_load, self.router_losses = ExpertLoad(), RouterLosses()

    rope_key: str | None = None
    """Which rotary table the layer reads, where the model has several (its layer type)."""
    traceable: bool = True
    """Whether one graph of tensors holds the whole second half."""
    expert_ranks: ExpertRanks | None = None
    """Ranks that share the layer's experts; None: all of them are here."""
    capacity: Capacity | None = None
    """Most rows that an expert takes; None: nothing is dropped."""
    index: int = 0
    """Number of the layer in the model."""
    products: LayerProducts | None = None
    """Where operands of the matrices' gradients wait for a pass of their own; None: backward makes them."""
    adapted: bool = True
    """Whether matrices with an adapter are multiplied with it (model/adapters); False: the layer is the frozen model's."""

    def trained(self) -> list[Tensor]:
        """Implements `LayerSteps.trained`. Of weights whose other parts are on other ranks it has a view of the part here."""
        self._views = {name: local(weight) for name, weight in self.layer.named_parameters()}
        return [view for view in self._views.values() if view.requires_grad]

    def use_expert_order(self, order: LayerOrder) -> None:
        """Implements `LayerSteps.use_expert_order`."""
        if self.expert_ranks is not None:
            self.expert_ranks = self.expert_ranks.ordered(order)

    def weight(self, name: str) -> Tensor:
        """The part here of a weight that ranks share: the view of the last `trained`, whose memory every later pass fills."""
        weight = self.layer.get_parameter(name)
        return self._views[name] if is_sharded(weight) else weight

    @property
    def sinks(self) -> Tensor | None:
        """Implements `LayerSteps.sinks`. Read anew each time, as projections are."""
        return None if self.sinks_name is None else self.layer.get_parameter(self.sinks_name)

    @property
    def correction_bias(self) -> Tensor | None:
        """The bias (E,) that choices of experts see and no gradient reaches, as it is now; None without."""
        return None

    def projection(self, name: str) -> Projection:
        """One of `projections`, with its weights as they are now."""
        return projection_of(self.layer, name, adapted=self.adapted, products=self.products)

    def before_attention(self, x: Tensor, rope: Rope, heads: Heads = ALL_HEADS, *, graph: bool = False) -> tuple[Tensor, ...]:
        """x (T, M) -> q (T, H, D), k and v (T, K, D), rotated; of the heads asked for, those of no head left out.

        `graph`: only gradients of the results are wanted, and their values may be anything.
        """
        h = self.input_norm(x)
        cos, sin = (table.unsqueeze(1) for table in rope)
        out = []
        if heads.queries != ():
            q = self.query(h, heads.queries, graph)
            out.append(self.rotate(q, cos, sin))
        if heads.keys != ():
            k, v = self.key_value(h, heads.keys, graph)
            out += [self.rotate(k, cos, sin), v]
        return tuple(out)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn queries or keys (T, H, D) by tables (T, 1, D): pairs are a number and the one half a head further."""
        return heads * cos + rotate_half(heads) * sin

    def after_attention(self, x: Tensor, o: Tensor) -> Tensor:
        """Layer input x (T, M) and attention output o (T, H, D) -> layer output (T, M). Token-local."""
        return self.feed_forward(self).forward(self.residual(x, o), NothingSaved())

    @abstractmethod
    def feed_forward(self, steps: LayerSteps) -> FeedForward:
        """The layer's feed-forward, whose token-local steps are run by `steps`."""

    def run_step(self, step: Step, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results of one of these steps (memory/executor/token_local.py)."""
        return step.run(self, tensors)

    def pull_back(
        self, step: Step, inputs: Sequence[Tensor], constants: Sequence[Tensor], upstream: Sequence[Tensor], sums: GradientSums
    ) -> tuple[Tensor, ...]:
        """Gradients through one of these steps (memory/executor/token_local.py)."""
        gradients = pull_back(self, step, inputs, constants, upstream, sums)
        if self.products is not None:
            self.products.own((*inputs, *constants, *upstream))
        return gradients

    @abstractmethod
    def input_norm(self, x: Tensor) -> Tensor:
        """The norm before the projections, (T, M) -> (T, M)."""

    @abstractmethod
    def query(self, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        """Normed input (T, M) -> queries (T, H, D) before rotation."""

    @abstractmethod
    def key_value(self, h: Tensor, heads: HeadIndex, graph: bool) -> tuple[Tensor, Tensor]:
        """Normed input (T, M) -> keys before rotation and values, each (T, K, D)."""

    @abstractmethod
    def residual(self, x: Tensor, o: Tensor, graph: bool = False) -> Tensor:
        """Layer input (T, M) plus attention's projected output (T, H, D) -> (T, M)."""

    def _spec(self) -> AttentionSpec:
        config = self.attention.config
        return AttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=self.attention.head_dim,
            scale=float(self.attention.scaling),
            window=self._window(),
            softcap=getattr(self.attention, "attn_logit_softcapping", None),
        )

    def _window(self) -> int | None:
        """Sliding window of this layer, as its attention module has it."""
        return getattr(self.attention, "sliding_window", None)

"""What a family's adapter provides: a decoder layer cut into two token-local halves around the attention core.

Legend: T local tokens, M model width, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ...errors import ConfigError
from ...parallel.sequence.attention import AttentionSpec

Rope = tuple[Tensor, Tensor]
"""cos and sin, each (T, D)."""


class LayerAdapter(ABC):
    """Reads the modules of one Hugging Face decoder layer; owns no weights."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.attention = layer, layer.self_attn
        if float(getattr(self.attention, "attention_dropout", 0.0)) > 0:
            raise ConfigError(
                "model.extra.attention_dropout",
                found=str(self.attention.attention_dropout),
                expected="0: block-wise attention has no dropout",
                hint="model.extra.attention_dropout=0.0",
            )
        self.spec = self._spec()

    rope_key: str | None = None
    """Which rotary table the layer reads, where the model has several (its layer type)."""

    @abstractmethod
    def before_attention(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, M) -> q (T, H, D), k and v (T, K, D), rotated. Token-local."""

    @abstractmethod
    def after_attention(self, x: Tensor, o: Tensor) -> Tensor:
        """Layer input x (T, M) and attention output o (T, H, D) -> layer output (T, M). Token-local."""

    def after_attention_graph(self, x: Tensor, o: Tensor) -> Tensor:
        """As after_attention, where only the gradients of what it returns are wanted and its values may be anything."""
        return self.after_attention(x, o)

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

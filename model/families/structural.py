"""Computes a decoder layer by what it is made of (structure.py), whatever its family: `StructuralLayer`.

Note: fused matrices. Queries, keys, values, gate and up are products of the rows that make them, as if each had a matrix of its own:
groups of heads are rows as well, and what is stored has one form for all families.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...memory.executor.feed_forward import DenseFeedForward
from ...memory.executor.token_local import FeedForward, LayerSteps
from ...memory.heads import HeadIndex, head_runs
from ..adapters.names import GATE_UP, QKV
from . import facts_of, family_of
from .adapter import LayerAdapter
from .facts import FamilyFacts
from .projection import Rows
from .rope import UNROTATED
from .structure import HeadNorms, Pairs, read_structure, turned


class StructuralLayer(LayerAdapter):
    """A layer of attention and a dense feed-forward, with what `Structure` says of it."""

    def __init__(self, layer: nn.Module) -> None:
        self.structure = read_structure(layer)
        self.projections, self.norms = self.structure.projections, self.structure.modules
        super().__init__(layer)
        config, index = self.attention.config, int(self.attention.layer_idx)
        if index in self._facts().unrotated(vars(config)):
            self.rope_key = UNROTATED
        elif self._facts().rope_per_layer_type:
            self.rope_key = config.layer_types[index]

    def feed_forward(self, steps: LayerSteps) -> FeedForward:
        """Implements `LayerAdapter.feed_forward` by `mlp_in` and `mlp_out`."""
        return DenseFeedForward(steps)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the first R numbers of queries or keys (T, H, D) by tables (T, 1, R); the others stay."""
        size, pairs, dtype = cos.shape[-1], self.structure.pairs, heads.dtype
        part, rest = heads[..., :size], heads[..., size:]
        if pairs is Pairs.NEIGHBOURS:
            cos, sin = (table[..., : size // 2].repeat_interleave(2, -1) for table in (cos, sin))
        if self.structure.turns_in_float32:
            part = part.to(torch.promote_types(dtype, torch.float32))
        part = (part * cos + turned(part, pairs) * sin).to(dtype)
        return torch.cat((part, rest), -1) if rest.shape[-1] else part

    def input_norm(self, x: Tensor) -> Tensor:
        """The norm before attention; x itself in layers whose norms come after."""
        return self._normed(self.structure.norms.before_attention, x)

    def query(self, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        """Normed input (T, M) -> queries (T, H, D) before rotation."""
        return self._of_heads("q", h, heads, graph)

    def key_value(self, h: Tensor, heads: HeadIndex, graph: bool) -> tuple[Tensor, Tensor]:
        """Normed input (T, M) -> keys before rotation and values, each (T, K, D)."""
        return self._of_heads("k", h, heads, graph), self._split(self._product("v", h, heads, graph))

    def residual(self, x: Tensor, o: Tensor, graph: bool = False) -> Tensor:
        """Layer input (T, M) plus attention's projected output -> (T, M); (T, 2 M) with the input behind it where halves are parallel."""
        norm = self.structure.norms.after_attention
        total = self._added(x, self._normed(norm, self.projection("self_attn.o_proj")(o.flatten(1), graph=graph and norm is None)))
        return torch.cat((total, x), 1) if self.structure.parallel else total

    def mlp_in(self, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Project rows to gate and up: what `residual` made -> (T, I) each."""
        structure = self.structure
        if structure.parallel:
            h = self._normed(structure.norms.before_attention, x[:, x.shape[1] // 2 :])
        else:
            h = self._normed(structure.norms.before_mlp, x)
        if not structure.fused_gate_up:
            return self.projection("mlp.gate_proj")(h, graph=graph), self.projection("mlp.up_proj")(h, graph=graph)
        both = self.projection(GATE_UP)
        inner = both.num_rows // 2
        return both(h, graph=graph, rows=(slice(0, inner),)), both(h, graph=graph, rows=(slice(inner, 2 * inner),))

    def mlp_out(self, x: Tensor, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        """Finish the layer: what `residual` and `mlp_in` made -> the layer's output (T, M)."""
        norm, mlp = self.structure.norms.after_mlp, self.layer.mlp
        down, act = self.projection("mlp.down_proj"), getattr(mlp, self.structure.activation)
        total = x[:, : x.shape[1] // 2] if self.structure.parallel else x
        return self._added(total, self._normed(norm, down(act(gate) * up, graph=graph and norm is None)))

    def _added(self, total: Tensor, part: Tensor) -> Tensor:
        scale = self.structure.residual_scale
        return total + (part if scale == 1.0 else part * scale)

    def _normed(self, name: str | None, rows: Tensor) -> Tensor:
        return rows if name is None else self.layer.get_submodule(name)(rows)

    def _of_heads(self, name: str, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        """Queries ("q") or keys ("k") of the heads asked for, normalised as they are. A norm's gradient needs the product's values."""
        kind = self.structure.head_norms
        if kind is HeadNorms.NONE:
            return self._split(self._product(name, h, heads, graph))
        norm: Any = getattr(self.attention, f"{name}_norm")
        if kind is HeadNorms.EACH_HEAD:
            return norm(self._split(self._product(name, h, heads, False)))  # type: ignore[no-any-return]
        # A norm over all heads needs all of them, whichever are asked for.
        whole = self._split(norm(self._product(name, h, None, False)))
        return whole if heads is None else torch.cat([whole[:, run] for run in head_runs(heads)], 1)

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.spec.head_dim))

    def _product(self, name: str, h: Tensor, heads: HeadIndex, graph: bool) -> Tensor:
        """Product (T, heads D) of queries, keys or values, of the heads asked for."""
        size, queries, keys = self.spec.head_dim, self.spec.num_heads, self.spec.num_kv_heads
        count = queries if name == "q" else keys
        if not self.structure.fused_qkv:
            return self.projection(f"self_attn.{name}_proj")(h, graph=graph, rows=_rows(heads, size))
        first = {"q": 0, "k": queries, "v": queries + keys}[name]
        chosen = tuple(range(count)) if heads is None else heads
        return self.projection(QKV)(h, graph=graph, rows=_rows(tuple(first + head for head in chosen), size))

    def _facts(self) -> FamilyFacts:
        family = family_of(self.attention.config.model_type)
        assert family is not None, "an adapter is asked for by its family"
        return facts_of(family)

    def _window(self) -> int | None:
        """Sliding window of this layer: some attention modules have it, others leave it to the mask."""
        return self._facts().windows(vars(self.attention.config))[int(self.attention.layer_idx)]


def _rows(heads: HeadIndex, size: int) -> Rows:
    """Rows of a matrix that make these heads of `size` numbers."""
    return None if heads is None else tuple(slice(run.start * size, run.stop * size) for run in head_runs(heads))

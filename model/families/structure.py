"""Recognises what a Hugging Face decoder layer is made of, from its modules and what they hold: `read_structure`.

Which order a layer has is known by the names of its norms, which mean different places in different layers: the same name may stand
before the feed-forward in one and after attention in another, and only the names of all of them together tell. What is recognised
is still nobody's word: `proof/compare.py` runs it beside Hugging Face's own forward. What is not recognised is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..adapters.names import GATE_UP, QKV

_SEPARATE_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_SEPARATE_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_OUT, _DOWN = "self_attn.o_proj", "mlp.down_proj"
_MATRICES = (QKV, *_SEPARATE_QKV, _OUT, GATE_UP, *_SEPARATE_GATE_UP, _DOWN)
"""What is inside of one is looked at where it is read (projection.py): factors of an adapter may be."""
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_ACTIVATIONS = ("act_fn", "activation_fn")
_NUMBERS = frozenset({"scaling", "attention_dropout", "residual_multiplier", "attn_logit_softcapping"})
"""Numbers in a layer's modules that are read."""


@dataclass(frozen=True, slots=True)
class NormPlaces:
    """Names of the norms over the hidden size, by what follows or goes before."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those there are."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name is not None)


PLACES: tuple[NormPlaces, ...] = (
    NormPlaces(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    NormPlaces(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    NormPlaces("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    NormPlaces("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    NormPlaces(before_attention="input_layernorm"),
)
"""The orders that are known. With one norm alone attention and feed-forward read the same: they are parallel."""


class HeadNorms(Enum):
    """What queries and keys are normalised over before they turn."""

    NONE = "none"
    EACH_HEAD = "each head"
    ALL_HEADS = "all heads together"


class Pairs(Enum):
    """Which numbers of a head turn together."""

    HALVES = "one half after the other"
    NEIGHBOURS = "neighbours"


@dataclass(frozen=True, slots=True)
class Structure:
    """What one decoder layer is made of."""

    norms: NormPlaces
    head_norms: HeadNorms
    fused_qkv: bool
    fused_gate_up: bool
    activation: str
    """Name of the activation in the feed-forward."""
    pairs: Pairs
    turns_in_float32: bool
    """Queries and keys are rotated in float32 at least."""
    residual_scale: float
    """What either half is multiplied with before it is added."""

    @property
    def parallel(self) -> bool:
        """Whether attention and feed-forward read the same norm."""
        return self.norms.names == PLACES[-1].names

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the layer's matrices."""
        return _projections(self.fused_qkv, self.fused_gate_up)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the norms, those of heads as well."""
        return (*self.norms.names, *(() if self.head_norms is HeadNorms.NONE else _HEAD_NORMS))


def read_structure(layer: nn.Module) -> Structure:
    """Read a decoder layer. ConfigError names the module, or the number in one, that it does not recognise, and its class."""
    modules = _modules(layer)
    fused = QKV in modules, GATE_UP in modules
    projections = _projections(*fused)
    pairs, wide = _rotation(layer)
    structure = Structure(
        norms=_norm_places(layer, modules),
        head_norms=_head_norms(layer, modules),
        fused_qkv=fused[0],
        fused_gate_up=fused[1],
        activation=_activation(layer),
        pairs=pairs,
        turns_in_float32=wide,
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )
    known = {*projections, *structure.modules, f"mlp.{structure.activation}"}
    for name, module in modules.items():
        if name not in known and not (type(module) is nn.Dropout and module.p == 0):
            raise _unknown(name, module)
    _check_numbers(layer)
    return structure


def _modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The layer's matrices, and of all other modules those that have none below them, by name."""
    inside = tuple(f"{name}." for name in _MATRICES)
    named = ((name, module) for name, module in layer.named_modules() if name and not name.startswith(inside))
    return {name: module for name, module in named if name in _MATRICES or not any(True for _ in module.children())}


def _projections(fused_qkv: bool, fused_gate_up: bool) -> tuple[str, ...]:
    qkv, gate_up = ((QKV,) if fused_qkv else _SEPARATE_QKV), ((GATE_UP,) if fused_gate_up else _SEPARATE_GATE_UP)
    return (*qkv, _OUT, *gate_up, _DOWN)


def _norm_places(layer: nn.Module, modules: Mapping[str, nn.Module]) -> NormPlaces:
    """The order whose norms are exactly those that the layer has directly below it."""
    there = {name: module for name, module in modules.items() if "." not in name and _is_norm(module)}
    for places in PLACES:
        if set(places.names) == set(there):
            return places
    named = ", ".join(f"{name} ({type(module).__qualname__})" for name, module in there.items()) or "no norm"
    raise _refusal(f"norms {named} in {type(layer).__qualname__}", "norms in an order that is known: " + "; ".join(_orders()))


def _orders() -> list[str]:
    return [" ".join(places.names) for places in PLACES]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of rows, torch's own or one of transformers'."""
    kind = type(module)
    theirs = kind.__module__.startswith("transformers.models.") and kind.__qualname__.endswith(("RMSNorm", "LayerNorm"))
    return theirs or kind in (nn.LayerNorm, nn.RMSNorm)


def _head_norms(layer: nn.Module, modules: Mapping[str, nn.Module]) -> HeadNorms:
    """What the norms of queries and keys are over, by the numbers of their weights."""
    there = [modules[name] for name in _HEAD_NORMS if name in modules]
    if not there:
        return HeadNorms.NONE
    if len(there) == 1 or not all(map(_is_norm, there)):
        raise _unknown(_HEAD_NORMS[0] if _HEAD_NORMS[0] in modules else _HEAD_NORMS[1], there[0])
    attention: Any = layer.self_attn
    heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    sizes = tuple(norm.weight.numel() for norm in there)  # type: ignore[union-attr]
    if sizes == (attention.head_dim,) * 2:
        return HeadNorms.EACH_HEAD
    if sizes == tuple(count * attention.head_dim for count in heads):
        return HeadNorms.ALL_HEADS
    actual = f"{_HEAD_NORMS[0]}, a {type(there[0]).__qualname__} of {sizes[0]}"
    raise _refusal(actual, f"{attention.head_dim} numbers, or those of all heads")


def _activation(layer: nn.Module) -> str:
    mlp: Any = layer.mlp
    names = [name for name in _ACTIVATIONS if hasattr(mlp, name)]
    if len(names) != 1 or any(True for _ in getattr(mlp, names[0]).parameters()):
        raise _refusal(f"mlp, a {type(mlp).__qualname__}", f"one of {', '.join(_ACTIVATIONS)} in it, without weights")
    return names[0]


def _rotation(layer: nn.Module) -> tuple[Pairs, bool]:
    """Which numbers turn together, and whether they do in float32: found by running the rotation of the layer's own code."""
    kind = type(layer.self_attn)
    code = sys.modules[kind.__module__]
    turn = getattr(code, "apply_rotary_pos_emb", None)
    if not kind.__module__.startswith("transformers.models.") or turn is None:
        raise _refusal(f"self_attn, a {kind.__qualname__}", "attention of transformers with its rotation, apply_rotary_pos_emb")
    with torch.device("cpu"):
        x, still = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), torch.zeros(1, 1, 4)
        quarter: Tensor = turn(x, x, still, still + 1)[0]
        narrow: Tensor = turn(*(each.bfloat16() for each in (x + 0.0078125, x, still + 0.7, still + 0.7)))[0]
    found = quarter.flatten().tolist()
    pairs = {(-3.0, -4.0, 1.0, 2.0): Pairs.HALVES, (-2.0, 1.0, -4.0, 3.0): Pairs.NEIGHBOURS}.get(tuple(found))
    if pairs is None:
        raise _refusal(f"the rotation of {kind.__module__}, which makes {found} of 1, 2, 3, 4", "pairs of halves or of neighbours")
    return pairs, _is_rounded_once(narrow, x, pairs)


def _is_rounded_once(narrow: Tensor, x: Tensor, pairs: Pairs) -> bool:
    """Whether bfloat16 went through float32: products and their sum are rounded together."""
    start, table = (x + 0.0078125).bfloat16(), torch.full((1, 1, 1, 4), 0.7).bfloat16()
    once = (start.float() * table + turned(start.float(), pairs) * table).bfloat16()
    thrice = start * table + turned(start, pairs) * table
    return torch.equal(narrow, once) and not torch.equal(once, thrice)


def turned(heads: Tensor, pairs: Pairs) -> Tensor:
    """The second of each pair with its sign changed, and the first, in each other's place: (..., R) -> (..., R)."""
    if pairs is Pairs.HALVES:
        first, second = heads.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-heads[..., 1::2], heads[..., ::2]), -1).flatten(-2)


def _check_numbers(layer: nn.Module) -> None:
    """Refuse a layer that holds a number which no step reads: it may be multiplied with it."""
    owners: Mapping[str, Any] = MappingProxyType({"": layer, "self_attn.": layer.self_attn, "mlp.": layer.mlp})
    for prefix, owner in owners.items():
        for name, value in vars(owner).items():
            if isinstance(value, float) and name not in _NUMBERS:
                raise _refusal(f"{prefix}{name}, {value} in a {type(owner).__qualname__}", f"no numbers but {', '.join(sorted(_NUMBERS))}")


def _unknown(name: str, module: nn.Module) -> ConfigError:
    return _refusal(f"{name}, a {type(module).__qualname__}", "matrices, norms and one activation under the names of known layers")


def _refusal(actual: str, expected: str) -> ConfigError:
    return ConfigError(
        "model",
        found=f"{actual} of a decoder layer, which is not recognised",
        expected=expected,
        hint="another model; or an adapter of its own, as model/families/llama.py",
    )

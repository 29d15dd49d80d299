"""Names of matrices and parameters: which have adapters, which are trained. Pure, and below everything that knows a model's sizes."""

from __future__ import annotations

from .config import AdapterConfig

FACTORS = "lora"
"""Name of the module beside a matrix that holds its factors A and B."""
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
"""Matrices that some families have in place of several: queries, keys and values; gate and up."""
_ALL = (*ATTENTION[:3], QKV, ATTENTION[3], *MLP[:2], GATE_UP, MLP[2])
"""Every matrix that any family has, in the model's order."""
MAGNITUDE = "magnitude"
"""Name of the parameter beside A and B that holds a length for each row (adapter.dora)."""
PACKED = "packed"
"""Name of the parameter that holds a quantised matrix as bytes, in place of `weight`."""
SAVED = ("embedding", "head", "norms")
"""Parts that adapter.modules_to_save may name."""
GROUPS = {
    "all-linear": _ALL,
    "attention": tuple(name for name in _ALL if name.startswith("self_attn.")),
    "mlp": tuple(name for name in _ALL if name.startswith("mlp.")),
}
"""Words of adapter.targets for several matrices: those of them that a layer has."""


def target_names(config: AdapterConfig) -> tuple[str, ...]:
    """Names of the matrices that `config` asks adapters for, inside a layer, in the model's order; of a checked config.

    A word for several names those of every family: a layer has some of them (targets.py knows which).
    """
    return _names(config.targets)


def quantized_names(config: AdapterConfig) -> tuple[str, ...]:
    """Names of the matrices that are packed, as `target_names`; none without adapter=qlora."""
    return _names(config.quantized) if config.quantizes else ()


def _names(words: list[str]) -> tuple[str, ...]:
    asked = {name for word in words for name in matching(word)}
    return tuple(name for name in _ALL if name in asked)


def matching(target: str) -> tuple[str, ...]:
    """The matrices that one item of adapter.targets means; none where it means nothing."""
    return GROUPS.get(target) or tuple(name for name in _ALL if target in (name, name.rpartition(".")[2]))


def is_factor(name: str) -> bool:
    """Whether a parameter is one of an adapter's factors, by its name in the model."""
    return f".{FACTORS}." in name


def is_packed(name: str) -> bool:
    """Whether a parameter is a matrix in bytes."""
    return name.endswith(f".{PACKED}")


def plain_name(name: str) -> str:
    """Name that a parameter has in a model that is not quantised."""
    return name.removesuffix(PACKED) + "weight" if is_packed(name) else name


def is_factor_b(name: str) -> bool:
    """Whether a parameter is the second factor, B."""
    return name.endswith(f".{FACTORS}.B")


def is_trained(name: str, config: AdapterConfig) -> bool:
    """Whether the parameter of this name in the model is trained."""
    return not config.is_trained or is_factor(name) or any(_is_of(name, part) for part in config.modules_to_save)


def _is_of(name: str, part: str) -> bool:
    if part == "norms":
        return name.endswith(("norm.weight", "norm.bias"))
    return name.startswith({"embedding": "model.embed_tokens.", "head": "lm_head."}[part])

"""Names of matrices and parameters: which have adapters, which are trained. Pure, and below everything that knows a model's sizes."""

from __future__ import annotations

from .config import AdapterConfig

FACTORS = "lora"
"""Name of the module beside a matrix that holds its factors A and B."""
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
PACKED = "packed"
"""Name of the parameter that holds a quantised matrix as bytes, in place of `weight`."""
SAVED = ("embedding", "head", "norms")
"""Parts that adapter.modules_to_save may name."""
GROUPS = {"all-linear": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}
"""Words of adapter.targets for several matrices."""


def target_names(config: AdapterConfig) -> tuple[str, ...]:
    """Names of the matrices that `config` asks adapters for, inside a layer, in the model's order; of a checked config."""
    return _names(config.targets)


def quantized_names(config: AdapterConfig) -> tuple[str, ...]:
    """Names of the matrices that are packed, as `target_names`; none without adapter=qlora."""
    return _names(config.quantized) if config.quantizes else ()


def _names(words: list[str]) -> tuple[str, ...]:
    asked = {name for word in words for name in matching(word)}
    return tuple(name for name in ATTENTION + MLP if name in asked)


def matching(target: str) -> tuple[str, ...]:
    """The matrices that one item of adapter.targets means; none where it means nothing."""
    return GROUPS.get(target) or tuple(name for name in ATTENTION + MLP if target in (name, name.rpartition(".")[2]))


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

"""Brings rotary settings, from a config.json of any form and from overrides, to the form transformers 5 reads. Pure.

Note: what a file says is read as transformers reads it (`convert_rope_params_to_dict`), and refused where transformers would drop a
part of it. What is asked for then replaces it, and everything the tables depend on is written out: the original length above all,
which is the file's own and not `model.max_positions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError
from ..units import parse_quantity
from .config import ModelConfig
from .families.facts import FULL, SLIDING, FamilyFacts

ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor", ORIGINAL),
        "longrope": ("short_factor", "long_factor", ORIGINAL),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
        "proportional": (),
    }
)
"""Rotary types and the parameters each cannot do without."""
_OPTIONAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dynamic": (ORIGINAL,),
        "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "longrope": ("factor", "attention_factor"),
        "proportional": ("factor", "partial_rotary_factor"),
    }
)
LEGACY_KEYS = ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", ORIGINAL)
"""Fields of a config.json that transformers moves into `rope_parameters`."""
Block = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RopeFields:
    """The rotary settings given to the Hugging Face config."""

    parameters: dict[str, Any]
    """Value of `rope_parameters`: one block, or one per layer type."""
    positions: int
    """Value of `max_position_embeddings`; of "dynamic" tables the original length, which they take from there."""
    reach: int
    """Positions the tables are meant for."""
    unread: tuple[str, ...] = ()
    """Parameters of the file that its rotary type does not read."""


def rope_fields(config: ModelConfig, facts: FamilyFacts, file: Mapping[str, Any], head_dim: int, positions: int) -> RopeFields:
    """The rotary settings of a model: `file` holds the fields of its config.json ({} for a model from scratch). ConfigError.

    `positions`: max_position_embeddings of the file, or model.max_positions of a model from scratch.
    """
    strict = "rope_parameters" in config.extra or config.path is None
    where = "model.extra." if strict else f"model.path {config.path}: "
    blocks = _file_blocks(facts, _with_extra(config, facts, file), where)
    unread: list[str] = []
    for key, block in blocks.items():
        original = None if config.path is None else positions
        unread += _settle(block, key, f"{where}rope_parameters", facts, head_dim, original, strict=strict)
        if (
            not strict
            and config.max_positions not in (None, positions)
            and block["rope_type"] in ("yarn", "longrope")
            and block.get("factor") is None
        ):
            # Left out, the factor is made from max_position_embeddings, which is about to change.
            block["factor"] = positions / block[ORIGINAL]
    main = FULL if facts.rope_per_layer_type else None
    _override(config, facts, blocks, main, positions, head_dim)
    reach = config.max_positions or positions
    dynamic = [block for block in blocks.values() if block["rope_type"] == "dynamic"]
    if dynamic:
        originals = {block.pop(ORIGINAL, positions) for block in dynamic}
        if len(originals) > 1:
            raise _wrong(f"{where}rope_parameters", f"original lengths {sorted(originals)}", "one for all dynamic tables", "one length")
        positions = originals.pop()
        return RopeFields(_joined(blocks), positions, config.max_positions or int(positions * dynamic[0]["factor"]), tuple(unread))
    return RopeFields(_joined(blocks), reach, reach, tuple(unread))


def _with_extra(config: ModelConfig, facts: FamilyFacts, file: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of the file, or those of `model.extra` in their place."""
    names = ("rope_parameters", "rope_local_base_freq", "partial_rotary_factor")
    asked: dict[str, Any] = {name: config.extra[name] for name in names if name in config.extra}
    fields = {name: value for name, value in file.items() if name in (*LEGACY_KEYS, "rope_parameters")}
    if "rope_parameters" in asked:
        both = [name for name in ("rope_theta", "rope_scaling") if getattr(config, name) is not None]
        both += [f"extra.{name}" for name in names[1:] if name in asked]
        if both:
            raise _wrong("model.extra.rope_parameters", f"it beside model.{both[0]}", "one of the two", f"model.{both[0]}=null")
        return {"rope_parameters": asked["rope_parameters"]}
    if "rope_local_base_freq" in asked and not (facts.rope_per_layer_type and facts.has_local_theta):
        actual = f"{asked['rope_local_base_freq']} for a {facts.model_type} model"
        raise _wrong("model.extra.rope_local_base_freq", actual, "a family with a table for layers with a window", "model.rope_theta=VALUE")
    if "rope_local_base_freq" in asked and isinstance(fields.get("rope_parameters"), Mapping):
        inner = fields["rope_parameters"]
        fields["rope_parameters"] = {**inner, SLIDING: {**(inner.get(SLIDING) or {}), "rope_theta": asked["rope_local_base_freq"]}}
    if "partial_rotary_factor" in asked:
        for form in ("rope_parameters", "rope_scaling"):
            if isinstance(fields.get(form), Mapping):
                fields[form] = {name: value for name, value in fields[form].items() if name != "partial_rotary_factor"}
    return {**fields, **asked}


def _joined(blocks: Mapping[str | None, Block]) -> dict[str, Any]:
    return dict(blocks[None]) if None in blocks else {str(key): block for key, block in blocks.items()}


def _file_blocks(facts: FamilyFacts, file: Mapping[str, Any], where: str) -> dict[str | None, Block]:
    """Blocks by layer type (None: one for all layers) as transformers reads them from these fields; every block has a base."""
    new, old = _mapping(file, "rope_parameters", where), _mapping(file, "rope_scaling", where)
    nested = [key for key in (FULL, SLIDING) if key in new]
    if facts.rope_per_layer_type:
        return _blocks_by_layer_type(facts, file, new, old, nested, where)
    if nested:
        raise _wrong(
            f"{where}rope_parameters",
            f"blocks for {', '.join(nested)}",
            f"one block: every {facts.model_type} layer has the same",
            "one block",
        )
    theta = _theta(file.get("rope_theta"), facts.default_theta)
    blocks = [_completed({**block, "rope_theta": _theta(block.get("rope_theta"), theta)}, facts, file) for block in (old, new) if block]
    if len(blocks) == 2 and _comparable(blocks[0]) != _comparable(blocks[1]):
        raise _wrong(f"{where}rope_scaling", f"{old} beside rope_parameters {new}", "both to say the same", "delete the one that is wrong")
    # A model from scratch is what is asked for; a file without a word on it is what transformers makes of that. An empty block is a word.
    default = facts.default_rope if where.startswith("model.path") and file.get("rope_parameters") is None else {}
    return {None: blocks[0] if blocks else _completed({**default, "rope_theta": theta}, facts, file)}


def _completed(block: Block, facts: FamilyFacts, file: Mapping[str, Any]) -> Block:
    """A block with what the file says of it outside."""
    if file.get("partial_rotary_factor") is not None:
        block.setdefault("partial_rotary_factor", file["partial_rotary_factor"])
    outside = file.get(ORIGINAL)
    if facts.outer_original_length and outside is None and file:
        outside = facts.defaults[ORIGINAL]
    if outside is not None and facts.rope_type_aliases.get(_kind(block), _kind(block)) in ("llama3", "yarn", "longrope"):
        block[ORIGINAL] = outside
    return block


def _blocks_by_layer_type(
    facts: FamilyFacts, file: Mapping[str, Any], new: Block, old: Block, nested: list[str], where: str
) -> dict[str | None, Block]:
    stray = sorted(set(new) - {FULL, SLIDING})
    if stray:
        raise _wrong(
            f"{where}rope_parameters",
            f"{', '.join(stray)} outside the blocks of layer types, where no layer reads them",
            f"blocks {FULL} and {SLIDING}",
            f"move them into rope_parameters.{FULL}",
        )
    if "rope_type" not in old and "type" in old:
        raise _wrong(f"{where}rope_scaling", "`type`, which transformers does not read here", "`rope_type`", f"rope_type: {old['type']}")
    blocks = {key: _mapping(new, key, f"{where}rope_parameters.") for key in (FULL, SLIDING)}
    if old and nested and _comparable({**blocks[FULL], **old}) != _comparable(blocks[FULL]):
        raise _wrong(f"{where}rope_scaling", f"{old} beside rope_parameters {new}", "both to say the same", "delete the one that is wrong")
    blocks[FULL] |= old
    blocks[FULL]["rope_theta"] = _theta(blocks[FULL].get("rope_theta"), _theta(file.get("rope_theta"), facts.default_theta))
    local = _theta(file.get("rope_local_base_freq") if facts.has_local_theta else None, facts.local_theta)
    blocks[SLIDING]["rope_theta"] = _theta(blocks[SLIDING].get("rope_theta"), local)
    if file.get("partial_rotary_factor") is not None:
        for block in blocks.values():
            block.setdefault("partial_rotary_factor", file["partial_rotary_factor"])
    return {FULL: blocks[FULL], SLIDING: blocks[SLIDING]}


def _override(
    config: ModelConfig, facts: FamilyFacts, blocks: dict[str | None, Block], main: str | None, positions: int, head_dim: int
) -> None:
    """`model.rope_scaling` replaces the block of layers without a window, `model.rope_theta` its base."""
    block = blocks[main]
    if config.rope_scaling is not None:
        asked = {key: value for key, value in config.rope_scaling.items() if value is not None}
        inner = asked.get("rope_theta")
        if inner is not None and config.rope_theta is not None and float(inner) != config.rope_theta:
            raise _wrong(
                "model.rope_scaling.rope_theta", f"{inner} beside model.rope_theta={config.rope_theta}", "one base", "leave one out"
            )
        asked["rope_theta"] = inner if inner is not None else block["rope_theta"]
        if facts.partial_rotary is not None and block.get("partial_rotary_factor") is not None:
            asked.setdefault("partial_rotary_factor", block["partial_rotary_factor"])
        original = block.get(ORIGINAL, positions) if config.path is not None else None
        _settle(asked, main, "model.rope_scaling", facts, head_dim, original, strict=True)
        blocks[main] = block = asked
    if config.rope_theta is not None:
        block["rope_theta"] = _number(config.rope_theta, "model.rope_theta")


def _settle(
    block: Block, key: str | None, where: str, facts: FamilyFacts, head_dim: int, original: int | None, *, strict: bool
) -> list[str]:
    """Write the block in full for its rotary type; returns the parameters that type does not read, which `strict` refuses.

    `original`: the length that stands in where the block gives none; None where nothing can.
    """
    kind = facts.rope_type_aliases.get(_kind(block), _kind(block))
    known = facts.rope_types or tuple(ROPE_KEYS)
    if kind not in known:
        other = "linear" if "linear" in known else known[-1]
        raise _wrong(
            f"{where}.rope_type",
            repr(kind),
            f"one of {', '.join(known)}",
            f"rope_type: {other}, with its factor" if where.startswith("model.path") else f"{where}.rope_type={other}",
        )
    block.pop("type", None)
    block["rope_type"] = kind
    if original is not None and (ORIGINAL in ROPE_KEYS[kind] or (kind == "dynamic" and strict)) and block.get(ORIGINAL) is None:
        block[ORIGINAL] = original
    _check_partial(block, kind, where, facts, head_dim)
    needed = [*ROPE_KEYS[kind], *([ORIGINAL] if kind == "dynamic" and strict else [])]
    missing = [
        name for name in needed if block.get(name) is None and not (name == "factor" and not strict and kind == "yarn" and name in block)
    ]
    if missing:
        hint = " ".join(f"+model.rope_scaling.{name}=VALUE" for name in missing)
        actual = f"no {', '.join(missing)} for rope_type {kind}"
        raise _wrong(f"{where}.{missing[0]}", actual, ", ".join(needed), hint if strict else "the file as it was published")
    names = {*needed, *_OPTIONAL.get(kind, ()), "rope_type", "rope_theta"}
    names |= {"partial_rotary_factor"} if facts.partial_rotary is not None else set()
    unread = sorted(name for name in block if name not in names)
    if not strict and kind == "dynamic" and ORIGINAL in block:
        unread.append(ORIGINAL)  # transformers takes max_position_embeddings
        del block[ORIGINAL]
    if unread and strict:
        raise _wrong(
            f"{where}.{unread[0]}",
            "a parameter that is not read",
            f"rope_type {kind} to read it: {', '.join(sorted(names))}",
            "no " + unread[0],
        )
    if "truncate" in block and key is not None and block["truncate"] is not True:
        raise _wrong(f"{where}.truncate", str(block["truncate"]), f"true: {facts.model_type} layers do not read it", "no truncate")
    _check_numbers(block, where, head_dim)
    return unread


def _check_partial(block: Block, kind: str, where: str, facts: FamilyFacts, head_dim: int) -> None:
    if facts.partial_rotary is not None and kind != "proportional":
        block["partial_rotary_factor"] = block.get("partial_rotary_factor") or facts.partial_rotary
    share = block.get("partial_rotary_factor")
    if share is None or kind == "proportional":
        return
    if facts.partial_rotary is not None:
        size = int(head_dim * _number(share, f"{where}.partial_rotary_factor"))
        if not 0 < size <= head_dim or size % 2:
            expected = f"a share of which an even number of a head's {head_dim} turns"
            raise _wrong(f"{where}.partial_rotary_factor", str(share), expected, _hint(f"{where}.partial_rotary_factor"))
        return
    if _number(share, f"{where}.partial_rotary_factor") != 1.0:
        expected = f"1: {facts.model_type} layers turn whole heads of {head_dim}, but for rope_type proportional"
        raise _wrong(f"{where}.partial_rotary_factor", str(share), expected, "another family, or rope_type proportional")
    del block["partial_rotary_factor"]


def _check_numbers(block: Block, where: str, head_dim: int) -> None:
    """Check that numbers are positive and finite, lengths whole, lists as long as the pairs; texts that are numbers become numbers."""
    for name, value in list(block.items()):
        place = f"{where}.{name}"
        if name in ("rope_type", "truncate") or value is None:
            continue
        if name == ORIGINAL:
            block[name] = _length(value, place)
        elif name in ("short_factor", "long_factor"):
            pairs = int(head_dim * (block.get("partial_rotary_factor") or 1)) // 2
            if not isinstance(value, (list, tuple)) or len(value) != pairs:
                actual = f"{len(value)} numbers" if isinstance(value, (list, tuple)) else repr(value)
                raise _wrong(place, actual, f"{pairs} numbers, one per pair of a head of {head_dim}", "the list as it was published")
            block[name] = [_number(item, place) for item in value]
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            block[name] = _number(value, place)
    if block["rope_type"] == "llama3" and block["high_freq_factor"] <= block["low_freq_factor"]:
        actual = f"{block['high_freq_factor']} with low_freq_factor {block['low_freq_factor']}"
        raise _wrong(f"{where}.high_freq_factor", actual, "more than low_freq_factor", "high_freq_factor=4 low_freq_factor=1")
    if block["rope_type"] == "proportional" and (block.get("partial_rotary_factor") or 1) > 1:
        raise _wrong(f"{where}.partial_rotary_factor", str(block["partial_rotary_factor"]), "a share, at most 1", "0.25")


def _kind(block: Mapping[str, Any]) -> str:
    # Older config files say `type`.
    return str(block.get("rope_type") or block.get("type") or "default")


def _comparable(block: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope_type": _kind(block),
        **{name: value for name, value in block.items() if name not in ("type", "rope_type") and value is not None},
    }


def _mapping(fields: Mapping[str, Any], name: str, where: str) -> Block:
    value = fields.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(f"{where}{name}", repr(value), "keys and values, or null", f"{name}: null")
    return dict(value or {})


def _theta(value: Any, default: float) -> Any:
    return default if value is None else value


def _number(value: Any, where: str) -> float | int:
    try:
        if isinstance(value, bool):
            raise ValueError("a truth value")
        number = value if isinstance(value, (int, float)) else float(value)
        if not (math.isfinite(number) and number > 0):
            raise ValueError("not positive and finite")
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(where, repr(value), "a finite number above 0", _hint(where)) from error
    return number


def _length(value: Any, where: str) -> int:
    try:
        length = int(parse_quantity(value, "tokens"))
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(where, repr(value), "a number of tokens", _hint(where)) from error
    if not 0 < length <= 1 << 40:
        raise _wrong(where, repr(value), "a number of tokens above 0", _hint(where))
    return length


def _hint(where: str) -> str:
    return "a config.json as it was published" if where.startswith("model.path") else f"{where}=VALUE"


def _wrong(where: str, actual: str, expected: str, hint: str) -> ConfigError:
    return ConfigError(where, found=actual, expected=expected, hint=hint)

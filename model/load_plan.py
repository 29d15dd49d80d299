"""Plans which stored tensor fills which parameter, and what in the files is unused, from headers alone. Pure.

Note: names are resolved as transformers does (a prefix `model.` may be missing, a tied head stands in for a missing embedding), and
text models inside larger ones are found by theirs (`language_model.`). What transformers would drop with a warning although it changes
what the model computes (biases, norms, scales, layers) is refused; the rest is reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..memory.activation_classes import ExpertSizes
from .families import facts_of
from .families.facts import FamilyFacts
from .plain_weights import PLAIN_DTYPES, is_quantised, quantised
from .spec import ModelSpec
from .stored_names import DOWN, GATE_UP, StoredPart, has_tensors_by_expert, stored_parts
from .weight_files import StoredTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PREFIXES = (("", ""), ("", "model."), ("language_model.", ""), ("model.language_model.", "model."), ("language_model.", "model."))
"""Prefixes (of the stored name, in its place): the first that gives a parameter's name counts."""
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids|attn\.bias)$")
"""Constants that older versions of transformers saved; it ignores them as well."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The source of each parameter, and what is not read at all."""

    parts: Mapping[str, tuple[StoredPart, ...]]
    """What fills each parameter, by the names that files of this kind have."""
    sources: Mapping[str, StoredTensor]
    """Stored tensor by such a name. Embedding and head may have fewer rows than the parameter: new ones are to be made."""
    names: Mapping[str, str]
    """Name in the file by such a name: prefixes differ."""
    unused: tuple[str, ...]
    """Names in the files that no parameter is filled from, but for constants of older versions."""
    shared_head: tuple[StoredTensor, StoredTensor] | None
    """Embedding and head where the model ties them and the files have both: they should hold the same."""


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the Hugging Face model, once, in its order; a tied head has none of its own."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(spec, layer)}
    shapes |= dict(_norm_shapes("model.norm", spec))
    return shapes if spec.tie_embeddings else {**shapes, HEAD: (spec.vocab_size, spec.hidden_size)}


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model that files hold: parameters, and what is trained by no gradient."""
    return parameter_shapes(spec) | buffer_shapes(spec)


def buffer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every persistent buffer of the Hugging Face model: the bias of scores of each router that has one."""
    facts = facts_of(spec.family).experts
    if spec.experts is None or facts is None or facts.correction_bias is None:
        return {}
    layers = (layer for layer in range(spec.num_layers) if layer not in spec.dense_layers)
    return {f"model.layers.{layer}.{facts.router}.{facts.correction_bias}": (spec.experts.num_experts,) for layer in layers}


def _layer_shapes(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, experts = spec.hidden_size, None if layer in spec.dense_layers else spec.experts
    if spec.attention_sinks:
        yield "self_attn.sinks", (spec.num_heads,)
    facts = facts_of(spec.family)
    linears = [*_attention_linears(spec, facts), ("self_attn.o_proj", hidden, spec.query_size, spec.output_bias)]
    if experts is None:
        linears += _dense_linears("mlp.", hidden, spec.intermediate_size, spec.mlp_bias, fused=facts.fused_gate_up)
    for name, rows, columns, has_bias in linears:
        yield f"{name}.weight", (rows, columns)
        if has_bias:
            yield f"{name}.bias", (rows,)
    if spec.qk_norm:
        sizes = (spec.query_size, spec.kv_size) if spec.norm_of_all_heads else (spec.head_dim,) * 2
        yield from ((f"self_attn.{name}.weight", (size,)) for name, size in zip(("q_norm", "k_norm"), sizes, strict=True))
    if experts is not None:
        yield from _expert_shapes(experts, facts, hidden)
    for name in facts.layer_norms:
        yield from _norm_shapes(name, spec)


def _norm_shapes(name: str, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (spec.hidden_size,)
    if spec.norm_bias:
        yield f"{name}.bias", (spec.hidden_size,)


def _attention_linears(spec: ModelSpec, facts: FamilyFacts) -> list[tuple[str, int, int, bool]]:
    """Of queries, keys and values: name, outputs, inputs and whether there is a bias."""
    sizes = {"q": spec.query_size, "k": spec.kv_size, "v": spec.kv_size}
    sizes = {"qkv": sum(sizes.values())} if facts.fused_qkv else sizes
    return [(f"self_attn.{name}_proj", rows, spec.hidden_size, spec.attention_bias) for name, rows in sizes.items()]


def _dense_linears(prefix: str, hidden: int, inner: int, has_bias: bool, *, fused: bool = False) -> list[tuple[str, int, int, bool]]:
    """Name, outputs, inputs and whether there is a bias."""
    into = (("gate_up", 2 * inner, hidden),) if fused else (("gate", inner, hidden), ("up", inner, hidden))
    ends = (*into, ("down", hidden, inner))
    return [(f"{prefix}{end}_proj", rows, columns, has_bias) for end, rows, columns in ends]


def _expert_shapes(experts: ExpertSizes, facts: FamilyFacts, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert facts.experts is not None
    count, inner, router = experts.num_experts, experts.inner_size, facts.experts.router
    yield f"{router}.weight", (count, hidden)
    if experts.has_router_bias:
        yield f"{router}.bias", (count,)
    for name, rows, columns in ((GATE_UP, 2 * inner, hidden), (DOWN, hidden, inner)):
        yield name, (count, columns, rows) if facts.experts.transposed else (count, rows, columns)
        if experts.has_biases:
            yield f"{name}_bias", (count, rows)
    if experts.shared_size:
        shared = _dense_linears(f"{facts.experts.shared_name}.", hidden, experts.shared_size, False)
        yield from ((f"{name}.weight", (rows, columns)) for name, rows, columns, _ in shared)
    if experts.has_shared_gate:
        yield f"{facts.experts.shared_name}_gate.weight", (1, hidden)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tensors that a model needs from the files."""

    parts: Mapping[str, tuple[StoredPart, ...]]
    """What fills each parameter, by parameter name; no head of its own where that is tied to the embedding."""
    facts: FamilyFacts
    file_vocabulary: int
    """Rows of embedding and head by the file's config.json; the model may have more."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], facts: FamilyFacts, file_vocabulary: int, stored: Iterable[str]) -> Wanted:
        """The tensors for parameters of these `shapes`, in the form of the files whose names are `stored`."""
        return cls(stored_parts(shapes, facts, by_expert=has_tensors_by_expert(stored, facts)), facts, file_vocabulary)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of the tensor."""
        return {part.name: part.shape for parts in self.parts.values() for part in parts}

    @property
    def is_tied(self) -> bool:
        return HEAD not in self.shapes

    @property
    def num_layers(self) -> int:
        return 1 + max(int(match[1]) for match in map(_LAYER.match, self.shapes) if match is not None)


def plan_load(wanted: Wanted, stored: Mapping[str, StoredTensor], folder: Path) -> LoadPlan:
    """The plan for a model of these sizes; ConfigError where the files are quantised, lack something or hold something else."""
    shapes = wanted.shapes
    names, unused = _resolve(shapes, stored, folder)
    if wanted.is_tied and EMBEDDING not in names and HEAD in unused:
        names[EMBEDDING] = unused.pop(HEAD)
    _check_plain(names, unused, stored, folder)
    _check_missing(wanted, names, stored, folder)
    _check_unused(wanted, unused, folder)
    sources = {name: stored[names[name]] for name in shapes}
    for name, shape in shapes.items():
        expected = (wanted.file_vocabulary, *shape[1:]) if name in (EMBEDDING, HEAD) else shape
        if sources[name].shape != expected:
            actual = f"{names[name]} of shape {list(sources[name].shape)}"
            raise _wrong(folder, actual, str(list(expected)), "weights and config.json of one model")
    head = unused.pop(HEAD, None)
    both = None if head is None else (sources[EMBEDDING], stored[head])
    return LoadPlan(wanted.parts, sources, names, tuple(sorted(unused.values())), both)


def _resolve(shapes: Mapping[str, Any], stored: Mapping[str, StoredTensor], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Stored name by parameter, and stored name by what it would be called for all the others."""
    wanted = {*shapes, HEAD}
    names: dict[str, str] = {}
    others: dict[str, str] = {}
    for name in stored:
        target = next((new + name[len(old) :] for old, new in _PREFIXES if name.startswith(old) and new + name[len(old) :] in wanted), None)
        if target is None:
            if not _BUFFERS.search(name):
                others[_as_parameter(name)] = name
        elif target in names:
            actual = f"{names[target]} and {name} for {target}"
            raise _wrong(folder, actual, "each weight once", "the weights of one model, in one form")
        else:
            names[target] = name
    if HEAD not in shapes and HEAD in names:
        others[HEAD] = names.pop(HEAD)
    return names, others


def _as_parameter(name: str) -> str:
    """The name with the prefixes of ours, so that a layer's is known as one."""
    for old, new in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(old):
            name = new + name[len(old) :]
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def _check_plain(names: Mapping[str, str], unused: Mapping[str, str], stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """Raise ConfigError where weights are stored in anything but plain floating point."""
    marked = [name for name in unused.values() if is_quantised(name)]
    odd = [name for name in names.values() if stored[name].dtype not in PLAIN_DTYPES]
    if marked or odd:
        what = f"{odd[0]} stored as {stored[odd[0]].dtype}" if odd else f"{marked[0]}"
        raise quantised(folder, f"{what}: quantised weights" + f" ({len(marked)} tensors of scales and the like)" * bool(marked))


def _check_missing(wanted: Wanted, names: Mapping[str, str], stored: Mapping[str, StoredTensor], folder: Path) -> None:
    missing = [name for name in wanted.shapes if name not in names]
    if not missing:
        return
    switch = _bias_switch(missing, wanted.facts)
    hint = "weights and config.json of one model, or model.path=null"
    if missing == [HEAD]:
        hint = "+model.extra.tie_word_embeddings=true, if the head is the embedding; or the file with lm_head"
    elif switch is not None:
        hint = f"+model.extra.{switch}=false, if the model has no such biases; or the file that has them"
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    others = [name for name in stored if name not in names.values()][:3]
    beside = f" (of {len(stored)} tensors{', as ' + ', '.join(others) if others else ''})"
    raise _wrong(folder, f"no tensor for {', '.join(missing[:5])}{more}{beside}", "every weight of the model", hint)


def _check_unused(wanted: Wanted, unused: Mapping[str, str], folder: Path) -> None:
    """Raise ConfigError for what belongs to the model's own modules and has no place in it."""
    modules = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
    inside = [name for name in unused if name.startswith(modules) and not (name == HEAD and wanted.is_tied)]
    if not inside:
        return
    layer, switch = _LAYER.match(inside[0]), _bias_switch(inside, wanted.facts)
    expected, hint = f"weights of a {wanted.facts.model_type} model with this config.json", "the config.json of these weights"
    if layer is not None and int(layer[1]) >= wanted.num_layers:
        expected = f"num_hidden_layers={wanted.num_layers}, as config.json has it"
    elif switch is not None:
        expected, hint = f"no biases: config.json has {switch}=false", f"+model.extra.{switch}=true"
    more = f" and {len(inside) - 1} more like it" if len(inside) > 1 else ""
    raise _wrong(folder, f"{unused[inside[0]]}{more}, which no part of the model reads", expected, hint)


_BIASES = {
    "attention_bias": frozenset(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    "mlp_bias": frozenset(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")),
}
"""All biases that come with a switch: with some of them alone no setting of it is right."""


def _bias_switch(names: Sequence[str], facts: FamilyFacts) -> str | None:
    """The field of config.json that speaks of exactly these parameters, where the family has it."""
    kinds = {_LAYER.sub("", name) for name in names}
    return next((switch for switch, biases in _BIASES.items() if biases == kinds and switch in facts.fields), None)


def _wrong(folder: Path, actual: str, expected: str, hint: str) -> ConfigError:
    return ConfigError(f"model.path {folder}", found=actual, expected=expected, hint=hint)

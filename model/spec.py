"""Describes a model as numbers: the one source for plans, parameter counts and checks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..memory.activation_classes import ExpertSizes
from ..utils.divisors import divisors, nearest_divisor
from .config import Family, ModelConfig
from .families import facts_of
from .families.facts import FULL
from .hf_fields import ModelFields, given_sizes, head_dim, model_family, model_fields
from .rope_fields import ORIGINAL


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Sizes of one decoder-only model; every count below follows from these alone."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool
    max_positions: int
    """Positions the rotary table is defined for."""
    windows: tuple[int | None, ...]
    """Tokens that attention looks back over, per layer; None for all of them."""
    qk_norm: bool
    """Norms of queries and keys before they are rotated."""
    attention_sinks: bool
    """A learnt logit of each query head joins attention's softmax."""
    attention_bias: bool
    """Whether the query, key and value projections have biases."""
    output_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    norms_per_layer: int
    """Norms over the hidden size in one decoder layer."""
    norm_product_in_float32: bool
    """Norms multiply with their weight before they return to the compute precision."""
    has_score_softcap: bool
    """Scores go through tanh before their softmax."""
    has_logit_softcap: bool
    """Logits go through tanh."""
    rotary_tables: int
    """Rotary tables of one micro-batch: one, or one per kind of layer, and one that turns nothing for layers that do not rotate."""
    experts: ExpertSizes | None = None
    """The mixture of experts of the layers that have one; None: feed-forwards are dense."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers without experts, in a model of layers with them."""
    unrotated_layers: tuple[int, ...] = ()
    """Numbers of the layers that do not rotate queries and keys."""
    norm_bias: bool = False
    """Norms over the hidden size have biases."""
    ends_with_norms: bool = False
    """Both halves of a layer end with a norm."""
    parallel: bool = False
    """Attention and feed-forward read the same norm of the layer's input, which is made for each of them."""
    wide_rotation: bool = False
    """Queries and keys turn in the precision of accumulations."""
    wide_tables: bool = False
    """Rotary tables are in the precision of accumulations."""
    fused_gate_up: bool = False
    """Gate and up are made by one matrix."""
    norm_of_all_heads: bool = False
    """The norms of queries and keys are over all heads together."""

    @property
    def head_norm_weights(self) -> int:
        """Weights of the norms of queries and keys in one layer."""
        return ((self.query_size + self.kv_size) if self.norm_of_all_heads else 2 * self.head_dim) * self.qk_norm

    @property
    def norm_weights(self) -> int:
        """Weights and biases of one norm over the hidden size."""
        return self.hidden_size * (1 + self.norm_bias)

    @property
    def norms_computed(self) -> int:
        """Norms over the hidden size that one pass of a layer computes."""
        return self.norms_per_layer + self.parallel

    @property
    def residual_size(self) -> int:
        """Numbers of a token's sum after attention; with the layer's input beside it where a parallel feed-forward reads that."""
        return self.hidden_size * (1 + self.parallel)

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return 0 if self.experts is None else self.num_layers - len(self.dense_layers)

    def of_layers(self, own: Sequence[int]) -> ModelSpec:
        """The same of some of the layers alone, numbered anew from 0."""
        dense, unrotated = (
            tuple(place for place, layer in enumerate(own) if layer in layers) for layers in (self.dense_layers, self.unrotated_layers)
        )
        experts = self.experts if self.experts is None else replace(self.experts, dense_share=len(dense) / len(own))
        windows = tuple(self.windows[layer] for layer in own)
        return replace(self, num_layers=len(own), windows=windows, experts=experts, dense_layers=dense, unrotated_layers=unrotated)

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Weights of one decoder layer."""

    total: int
    """Number of all weights: bytes follow from them."""
    active: int
    """Number of weights one token is multiplied with: FLOPs follow. Fewer than `total` where a token visits some experts only."""
    experts: int = 0
    """Number of the routed experts' among all."""


def layer_parameters(spec: ModelSpec) -> tuple[LayerParameters, ...]:
    """Weights of each decoder layer, from the first to the last."""
    others = _attention_parameters(spec) + spec.norms_per_layer * spec.norm_weights
    every, active = _dense_parameters(spec)
    dense = LayerParameters(total=others + every, active=others + active)
    if spec.experts is None:
        return (dense,) * spec.num_layers
    every, active = _expert_parameters(spec.experts, spec.hidden_size)
    routed = LayerParameters(total=others + every, active=others + active, experts=expert_weights(spec))
    return tuple(dense if layer in spec.dense_layers else routed for layer in range(spec.num_layers))


def active_layer_parameters(spec: ModelSpec) -> float:
    """Weights of a decoder layer that one token is multiplied with, the layers' mean."""
    return sum(layer.active for layer in layer_parameters(spec)) / spec.num_layers


def feed_forward_weights(spec: ModelSpec, elsewhere: int = 0) -> int:
    """Numbers of the matrices of the largest feed-forward that gradients are made of: three of it, or of each expert and the shared one.

    `elsewhere`: weights of experts that are on other ranks.
    """
    dense = 3 * spec.hidden_size * spec.intermediate_size
    if spec.experts is None:
        return dense
    routed = 3 * spec.hidden_size * (spec.experts.num_experts * spec.experts.inner_size + spec.experts.shared_size) - elsewhere
    return max(routed, dense) if spec.dense_layers else routed


def expert_weights(spec: ModelSpec) -> int:
    """Weights of all routed experts of one layer, biases in; 0 for a dense model."""
    return 0 if spec.experts is None else spec.experts.num_experts * _one_expert(spec.experts, spec.hidden_size)


def _attention_parameters(spec: ModelSpec) -> int:
    hidden, queries, keys = spec.hidden_size, spec.query_size, spec.kv_size
    biases = (queries + 2 * keys) * spec.attention_bias + hidden * spec.output_bias
    sinks = spec.num_heads * spec.attention_sinks
    return 2 * hidden * queries + 2 * hidden * keys + biases + spec.head_norm_weights + sinks


def _dense_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Weights of a dense feed-forward, and those a token is multiplied with: the same."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    every = 3 * hidden * inner + (2 * inner + hidden) * spec.mlp_bias
    return every, every


def _expert_parameters(experts: ExpertSizes, hidden: int) -> tuple[int, int]:
    """Weights of a mixture of experts, and those a token is multiplied with: the router's, its own experts' and the shared one's."""
    one = _one_expert(experts, hidden)
    shared = 3 * hidden * experts.shared_size + hidden * experts.has_shared_gate
    always = experts.num_experts * (hidden + experts.has_router_bias) + shared
    return always + experts.num_experts * one, always + experts.per_token * one


def _one_expert(experts: ExpertSizes, hidden: int) -> int:
    return 3 * hidden * experts.inner_size + (2 * experts.inner_size + hidden) * experts.has_biases


def num_parameters(spec: ModelSpec) -> int:
    """All weights; a tied head counts once."""
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    return sum(layer.total for layer in layer_parameters(spec)) + embeddings + spec.norm_weights


def model_spec(config: ModelConfig) -> ModelSpec:
    """The sizes of a checked config: from its own fields, or from the config.json at its path."""
    model = _checked(config)
    facts, fields = model.facts, model.full
    heads, unrotated = fields["num_attention_heads"], facts.unrotated(fields)
    return ModelSpec(
        family=facts.family,
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        vocab_size=fields["vocab_size"],
        tie_embeddings=bool(fields.get("tie_word_embeddings")),
        max_positions=model.rope.reach,
        windows=facts.windows(fields),
        qk_norm=facts.qk_norm,
        attention_sinks=facts.attention_sinks,
        attention_bias=facts.qkv_bias(fields),
        output_bias=facts.output_bias(fields),
        mlp_bias=facts.mlp_bias(fields),
        norms_per_layer=facts.norms_per_layer,
        norm_product_in_float32=facts.norm_product_in_float32,
        has_score_softcap=facts.has_score_softcap and fields.get("attn_logit_softcapping") is not None,
        has_logit_softcap=facts.has_logit_softcap and fields.get("final_logit_softcapping") is not None,
        rotary_tables=facts.rotary_tables + bool(unrotated),
        experts=None if facts.experts is None else facts.experts.sizes(fields),
        dense_layers=() if facts.experts is None else facts.experts.dense_layers(fields),
        unrotated_layers=unrotated,
        norm_bias=facts.norm_bias,
        ends_with_norms=facts.ends_with_norms,
        parallel=facts.parallel,
        wide_rotation=facts.wide_rotation,
        wide_tables=facts.wide_tables,
        fused_gate_up=facts.fused_gate_up,
        norm_of_all_heads=facts.norm_of_all_heads,
    )


def check_model(config: ModelConfig) -> None:
    """Raise ConfigError unless the config names one model this package can train."""
    _checked(config)


def _checked(config: ModelConfig) -> ModelFields:
    if config.path is not None:
        _check_path(config)
    else:
        _check_present(config)
        _check_heads(config)
    model = model_fields(config)
    _check_window(config, model)
    return model


def longer_positions(config: ModelConfig, length: int) -> list[str]:
    """Overrides that extend a model to `length` positions: YaRN from the length it was made for; none is needed from scratch."""
    model = _checked(config)
    raised = f"model.max_positions={length}"
    block = model.rope.parameters.get(FULL, model.rope.parameters)
    if (config.path is None and block["rope_type"] == "default") or "yarn" not in (model.facts.rope_types or ("yarn",)):
        return [raised]
    original = block.get(ORIGINAL) or model.rope.positions
    factor = max(-(-length // original), 1)
    return [raised, f"'model.rope_scaling={{rope_type: yarn, factor: {factor}.0, {ORIGINAL}: {original}}}'"]


def _check_path(config: ModelConfig) -> None:
    given = given_sizes(config)
    if given:
        tied = (
            "" if config.tie_embeddings is None else f", and +model.extra.tie_word_embeddings={str(config.tie_embeddings).lower()} instead"
        )
        raise ConfigError(
            f"model.{given[0]}",
            found=f"{_shown(getattr(config, given[0]))} beside model.path={config.path}",
            expected="sizes from the config.json at model.path only",
            hint=" ".join(f"model.{name}=null" for name in given) + tied,
        )
    model_family(config)


def _check_present(config: ModelConfig) -> None:
    needed = ["family", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size", "max_positions"]
    if config.family is not None and facts_of(config.family).needs_window and "layer_types" not in config.extra:
        needed.append("sliding_window")
    missing = [name for name in needed if getattr(config, name) is None]
    if missing:
        raise ConfigError(
            f"model.{missing[0]}",
            found=f"no {', '.join(missing)} in model {config.name}",
            expected="every size of a model without model.path",
            hint=" ".join(f"model.{name}=VALUE" for name in missing) + ", or model.path=DIRECTORY",
        )
    for name in [*needed[1:], "head_dim"]:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"model.{name}", found=str(value), expected="a number above 0", hint=f"model.{name}=VALUE")


def _check_heads(config: ModelConfig) -> None:
    heads, kv_heads, hidden = config.num_heads, config.num_kv_heads, config.hidden_size
    assert heads is not None and kv_heads is not None and hidden is not None
    if heads % kv_heads:
        raise ConfigError(
            "model.num_kv_heads",
            found=f"{kv_heads} KV heads for {heads} heads",
            expected=f"a divisor of {heads}: {', '.join(map(str, divisors(heads)))}",
            hint=f"model.num_kv_heads={nearest_divisor(heads, kv_heads)}",
        )
    if config.head_dim is None and hidden % heads:
        raise ConfigError(
            "model.num_heads",
            found=f"{heads} heads for hidden size {hidden}",
            expected="a divisor of the hidden size where model.head_dim is not given",
            hint="model.head_dim=VALUE or another model.num_heads",
        )
    if head_dim(config) % 2:
        raise ConfigError(
            "model.head_dim",
            found=str(head_dim(config)),
            expected="an even number, for rotary embeddings turn pairs",
            hint=f"model.head_dim={head_dim(config) + 1}",
        )


def _check_window(config: ModelConfig, model: ModelFields) -> None:
    """Raise ConfigError where a window is asked for and no layer has it."""
    key = "model.sliding_window" if config.sliding_window is not None else "model.extra.sliding_window"
    window = config.sliding_window if config.sliding_window is not None else config.extra.get("sliding_window")
    if window is None or any(model.facts.windows(model.full)):
        return
    family, layers = model.facts.family.value, model.full["num_hidden_layers"]
    if not model.facts.has_window:
        raise ConfigError(
            key,
            found=f"{window} for a {family} model",
            expected="null: this family has no sliding window",
            hint=f"{key}=null or model.family=mistral",
        )
    if "max_window_layers" not in model.facts.fields:
        raise ConfigError(
            key, found=f"{window}, but no layer uses it", expected="a layer of type sliding_attention in layer_types", hint=f"{key}=null"
        )
    first = model.full["max_window_layers"]
    raise ConfigError(
        key,
        found=f"{window}, but no layer uses it: layers from max_window_layers ({first}) on do",
        expected=f"model.extra.max_window_layers below {layers}, and model.extra.use_sliding_window=true",
        hint="+model.extra.max_window_layers=0" + " +model.extra.use_sliding_window=true" * (config.path is not None),
    )


def _shown(value: object) -> str:
    return str(getattr(value, "value", value))

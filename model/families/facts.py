"""Describes a model family without torch: names, defaults, norms, biases, windows, rotary tables. Pure.

Estimates and checks ask these facts (through `ModelSpec`, whose numbers come from here) and never compare with a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Family
from .expert_facts import ExpertFacts, Refusal

Windows = tuple[int | None, ...]
"""Per layer: tokens attention looks back over, None for all of them."""

DEFAULT_THETA = 10_000.0
"""Base of the rotary angles where nothing else is given."""
SLIDING = "sliding_attention"
FULL = "full_attention"


READ_BY_ALL = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
        *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    }
)
"""Fields of a config that every family reads."""
LABELS = frozenset(
    {
        *("architectures", "transformers_version", "_name_or_path", "auto_map", "model_type", "dtype", "torch_dtype", "use_cache"),
        *("id2label", "label2id", "is_encoder_decoder", "output_hidden_states", "output_attentions", "problem_type", "return_dict"),
        *("chunk_size_feed_forward", "cache_implementation", "_attn_implementation_autoset", "torchscript", "use_bfloat16"),
    }
)
"""Fields of a config that say nothing about the architecture."""


def no_windows(fields: Mapping[str, Any]) -> Windows:
    """Every layer attends to everything before a token."""
    return (None,) * int(fields["num_hidden_layers"])


def all_rotate(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Every layer rotates queries and keys."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFacts:
    """One family, as its Hugging Face classes have it. `fields` below are those of a config.json, defaults filled in."""

    family: Family
    model_type: str
    """What `AutoConfig.for_model` calls it."""
    defaults: Mapping[str, Any]
    """Defaults of the Hugging Face config class, for fields a config.json may leave out (`save_pretrained` leaves them out)."""
    fields: frozenset[str]
    """Fields of its config that its layers read, besides READ_BY_ALL."""
    unread: frozenset[str] = frozenset()
    """Fields its config class has and none of its layers reads."""
    wrapped_by: str | None = None
    """Model type of configs that hold this family's under `text_config`, beside other parts that are not trained here."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that a config.json has for fields, by those names."""
    activation_field: str = "hidden_act"
    heads_divide_hidden: bool = False
    """Whether the Hugging Face config refuses a hidden size that the heads do not divide, whatever the head dim."""
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Names of the norms over the hidden size in one decoder layer."""
    norm_offset: float = 0.0
    """What norms add to their weight before they multiply."""
    norm_bias: bool = False
    """Norms over the hidden size have biases."""
    ends_with_norms: bool = False
    """Both halves of a layer end with a norm before they are added to its input."""
    parallel: bool = False
    """Attention and feed-forward read the same norm of the layer's input, and both are added to it."""
    qk_norm: bool = False
    """Norms of queries and keys before they are rotated."""
    norm_of_all_heads: bool = False
    """These norms are over all heads together, not over each."""
    attention_sinks: bool = False
    """`self_attn.sinks`: a learnt logit of each query head joins attention's softmax."""
    norm_product_in_float32: bool = False
    """Norms multiply with their weight before they return to the compute precision: more is saved for backward."""
    has_parity_rows: bool = False
    """Tests compare it with Hugging Face on ranks that share sequences (tests/parity/); a run of any other is compared before it trains."""
    fused_qkv: bool = False
    """Queries, keys and values are made by one matrix, `qkv_proj`, in this order."""
    fused_gate_up: bool = False
    """Gate and up are made by one matrix, `gate_up_proj`, in this order."""
    structural: bool = False
    """What computes a layer is read off its modules (structure.py): there is no adapter of the family's own."""
    qkv_bias: Callable[[Mapping[str, Any]], bool] = field(default=lambda fields: bool(fields.get("attention_bias")))
    output_bias: Callable[[Mapping[str, Any]], bool] = field(default=lambda fields: bool(fields.get("attention_bias")))
    mlp_bias: Callable[[Mapping[str, Any]], bool] = field(default=lambda fields: False)
    has_window: bool = True
    """Whether there are sliding windows at all."""
    needs_window: bool = False
    """Whether some layers have one whatever the config says: `model.sliding_window` must be given."""
    windows: Callable[[Mapping[str, Any]], Windows] = no_windows
    window_fields: Callable[[int | None], dict[str, Any]] = field(default=lambda window: {"sliding_window": window})
    """`model.sliding_window` as fields of the Hugging Face config."""
    has_score_softcap: bool = False
    """Scores go through tanh before their softmax where `attn_logit_softcapping` is set."""
    has_logit_softcap: bool = False
    """Logits go through tanh where `final_logit_softcapping` is set."""
    logit_scale: Callable[[Mapping[str, Any]], float] = field(default=lambda fields: 1.0)
    """What logits are multiplied with."""
    embedding_scale: Callable[[Mapping[str, Any]], float] = field(default=lambda fields: 1.0)
    """What embeddings are multiplied with outside their module."""
    partial_rotary: float | None = None
    """Share of a head that turns where a config.json does not say it; None: whole heads do, and no other share is read."""
    wide_rotation: bool = False
    """Queries and keys turn in float32 at least."""
    wide_tables: bool = False
    """Rotary tables are not rounded to the precision of computation."""
    rope_types: tuple[str, ...] = ()
    """The rotary types that its config class takes; none: all."""
    outer_original_length: bool = False
    """Its config class has `original_max_position_embeddings` beside the rotary settings as well, and reads that one."""
    rope_type_aliases: Mapping[str, str] = field(default_factory=dict)
    """Older names of rotary types in its config.json."""
    rope_per_layer_type: bool = False
    """A rotary table for layers with a window and one for the others."""
    local_theta: float = DEFAULT_THETA
    """Base of the rotary angles of layers with a window, where there are two tables."""
    has_local_theta: bool = True
    """Whether `rope_local_base_freq` sets that base."""
    unrotated: Callable[[Mapping[str, Any]], tuple[int, ...]] = all_rotate
    """Numbers of the layers that do not rotate queries and keys."""
    default_theta: float = DEFAULT_THETA
    """Base of the rotary angles (of layers without a window, where there are two tables)."""
    default_rope: Mapping[str, Any] = field(default_factory=dict)
    """The rotary settings of a config.json that has none, beside the base."""
    experts: ExpertFacts | None = None
    """The mixture of experts of its layers; None: feed-forwards are dense."""
    problem: Callable[[Mapping[str, Any]], Refusal | None] = field(default=lambda fields: None)
    """What of a config cannot be trained, beside its experts."""

    @property
    def norms_per_layer(self) -> int:
        """RMS norms over the hidden size in one decoder layer."""
        return len(self.layer_norms)

    @property
    def rotary_tables(self) -> int:
        return 2 if self.rope_per_layer_type else 1

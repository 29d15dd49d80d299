"""A config.json with the sizes and switches of public models, one and more of every family; and some that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PLAIN: dict[str, Any] = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
_SILU = {**_PLAIN, "hidden_act": "silu"}


def _sizes(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, positions: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": positions,
    }  # fmt: skip


_GEMMA = {**_PLAIN, "hidden_activation": "gelu_pytorch_tanh", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "rms_norm_eps": 1e-6}
_VISION = {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model", "num_hidden_layers": 27}
SUPPORTED: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **_SILU, "model_type": "llama", "architectures": ["LlamaForCausalLM"], **_sizes(16, 2048, 8192, 32, 8, 128256, 131072),
        "head_dim": 64, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    },
    "Mistral-7B-v0.1": {
        **_SILU, "model_type": "mistral", "architectures": ["MistralForCausalLM"], **_sizes(32, 4096, 14336, 32, 8, 32000, 32768),
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    },
    "Mistral-Small-3.1-24B": {
        "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
        "tie_word_embeddings": False,
        "text_config": {
            **_SILU, "model_type": "mistral", **_sizes(40, 5120, 32768, 32, 8, 131072, 131072), "head_dim": 128, "rms_norm_eps": 1e-5,
            "rope_theta": 1000000000.0, "sliding_window": None,
        },
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
    },
    "Qwen2.5-7B": {
        **_SILU, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_sizes(28, 3584, 18944, 28, 4, 152064, 131072),
        "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "use_mrope": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151643,
    },
    "Qwen3-0.6B": {
        **_SILU, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_sizes(28, 1024, 3072, 16, 8, 151936, 40960),
        "head_dim": 128, "attention_bias": False, "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": True,
    },
    "gemma-2-27b": {
        **_GEMMA, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **_sizes(46, 4608, 36864, 32, 16, 256000, 8192),
        "head_dim": 128, "attention_bias": False, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 144, "sliding_window": 4096, "rope_theta": 10000.0, "cache_implementation": "hybrid",
    },
    "gemma-3-1b": {
        **_GEMMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], **_sizes(26, 1152, 6912, 4, 1, 262144, 32768),
        "head_dim": 256, "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000,
    },
    "gemma-3-4b": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "image_token_index": 262144,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": _VISION,
    },
    "Mixtral-8x7B": {
        **_SILU, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **_sizes(32, 4096, 14336, 32, 8, 32000, 32768),
        "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.02,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    },
    "Qwen1.5-MoE-A2.7B": {
        **_SILU, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], **_sizes(24, 2048, 5632, 16, 16, 151936, 8192),
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "output_router_logits": False, "router_aux_loss_coef": 0.001,
        "max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    },
    "Qwen3-30B-A3B": {
        **_SILU, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **_sizes(48, 2048, 6144, 32, 4, 151936, 40960),
        "head_dim": 128, "attention_bias": False, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48, "sliding_window": None,
        "use_sliding_window": False, "output_router_logits": False, "router_aux_loss_coef": 0.001, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_scaling": None, "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        **_SILU, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **_sizes(24, 2880, 2880, 64, 8, 201088, 131072),
        "head_dim": 64, "attention_bias": True, "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
        "initial_context_length": 4096, "layer_types": ["sliding_attention", "full_attention"] * 12, "output_router_logits": False,
        "router_aux_loss_coef": 0.9, "rms_norm_eps": 1e-5, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
            "truncate": False,
        },
        "pad_token_id": 199999, "eos_token_id": 200002, "tie_word_embeddings": False,
    },
    "dots.llm1": {
        **_SILU, "model_type": "dots1", "architectures": ["Dots1ForCausalLM"], **_sizes(62, 4096, 10944, 32, 32, 152064, 32768),
        "attention_bias": False, "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "max_window_layers": 62, "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 10000000, "tie_word_embeddings": False,
    },
    "SmolLM3-3B": {
        **_SILU, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], **_sizes(36, 2048, 11008, 16, 4, 128256, 65536),
        "attention_bias": False, "mlp_bias": False, "layer_types": ["full_attention"] * 36, "max_window_layers": 28,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "sliding_window": None, "use_sliding_window": False,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "pad_token_id": 128004, "eos_token_id": 128012,
        "bos_token_id": 128000, "pretraining_tp": 2,
    },
    "OLMo-2-1124-7B": {
        **_SILU, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **_sizes(32, 4096, 11008, 32, 32, 100352, 4096),
        "attention_bias": False, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
        "pad_token_id": 100277, "eos_token_id": 100257,
    },
    "Olmo-3-1025-7B": {
        **_SILU, "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], **_sizes(32, 4096, 11008, 32, 32, 100278, 65536),
        "attention_bias": False, "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8, "sliding_window": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 500000, "tie_word_embeddings": False, "pad_token_id": 100277, "eos_token_id": 100257,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1,
            "attention_factor": 1.2079441541679836,
        },
    },
    "Phi-3-mini-128k": {
        **_SILU, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_sizes(32, 3072, 8192, 32, 32, 32064, 131072),
        "original_max_position_embeddings": 4096, "sliding_window": 262144, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1 + i / 50 for i in range(48)], "long_factor": [1.0 + i for i in range(48)]},
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 32000,
        "pad_token_id": 32000, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    },
    "Phi-4-mini": {
        **_SILU, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_sizes(32, 3072, 8192, 24, 8, 200064, 131072),
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "sliding_window": 262144, "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i / 2 for i in range(48)]},
        "rope_theta": 10000.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True, "bos_token_id": 199999,
        "eos_token_id": 199999, "pad_token_id": 199999, "attention_bias": False, "mlp_bias": False, "interpolate_factor": 1,
    },
    "granite-3.1-8b": {
        **_SILU, "model_type": "granite", "architectures": ["GraniteForCausalLM"], **_sizes(40, 4096, 12800, 32, 8, 49152, 131072),
        "attention_bias": False, "mlp_bias": False, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
        "logits_scaling": 16.0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000000.0,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "attention_dropout": 0.0,
    },
    "GLM-4-9B-0414": {
        **_SILU, "model_type": "glm4", "architectures": ["Glm4ForCausalLM"], **_sizes(40, 4096, 13696, 32, 2, 151552, 32768),
        "attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
    },
    "c4ai-command-r7b": {
        **_SILU, "model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], **_sizes(32, 4096, 14336, 32, 8, 256000, 132096),
        "attention_bias": False, "head_dim": 128, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "rope_scaling": None,
        "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4, "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "use_embedding_sharing": True,
        "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": False, "use_qk_norm": False,
        "bos_token_id": 5, "eos_token_id": 255001, "pad_token_id": 0,
    },
    "Ministral-8B": {
        **_SILU, "model_type": "ministral", "architectures": ["MinistralForCausalLM"], **_sizes(36, 4096, 12288, 32, 8, 131072, 32768),
        "head_dim": 128, "layer_types": ["full_attention", *["sliding_attention"] * 3] * 9, "sliding_window": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 100000000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    },
    "stablelm-3b-4e1t": {
        **_SILU, "model_type": "stablelm", "architectures": ["StableLmForCausalLM"], **_sizes(32, 2560, 6912, 32, 32, 50304, 4096),
        "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False,
        "use_qkv_bias": False, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "BERT": (
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768},
        "found model_type 'bert', no decoder alone (BertForMaskedLM); expected one of llama, mistral",
    ),
    "T5": (
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        "found model_type 't5', no decoder alone (T5ForConditionalGeneration);",
    ),
    "Llava": (
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": {}, "vision_config": _VISION},
        "found model_type 'llava', with a tower for images or sound, which is not trained;",
    ),
    "Ministral-3-8B": (
        {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}, "vision_config": _VISION},
        "found model_type 'mistral3', around a text model of type 'ministral3', with a tower for images or sound, which is not trained;",
    ),
    "Qwen-7B": (
        {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}},
        "found model_type 'qwen', with code of its own (auto_map), which is not run;",
    ),
    "GPT-2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "found model_type 'gpt2'; expected one of llama, mistral"),
    "gpt-oss-20b before it is dequantised": (
        {**SUPPORTED["gpt-oss-20b"], "quantization_config": {"quant_method": "mxfp4"}}, "quantization_config in config.json (mxfp4)",
    ),
    "an unknown rope type": (
        {**SUPPORTED["Qwen3-0.6B"], "rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "rope_type: found 'spiral'; expected one of",
    ),
}  # fmt: skip


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A directory with this config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

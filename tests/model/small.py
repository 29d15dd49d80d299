"""Small models of every family as directories: what a user's model.path is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.model.config import ModelConfig
from efflaunch.model.weights import persistent_buffers

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 11},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "olmo3": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 11, "eos_token_id": 1},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 4.0},
    "glm4": {"eos_token_id": 1},
    "cohere2": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "eos_token_id": 1},
    "ministral": {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
    "stablelm": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "dots1": {
        "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": None,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7, "rope_parameters": PLAIN_ROPE},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


def save_model(folder: Path, model_type: str = "llama", shard: str = "1GB", **changes: Any) -> Path:
    """Random weights everywhere, norms and biases included."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for bias in persistent_buffers(model).values():
            bias.add_(torch.randn_like(bias))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_config(folder: Path, *removed: str, **changes: Any) -> None:
    """Change fields of config.json."""
    file = folder / "config.json"
    fields = {key: value for key, value in json.loads(file.read_text()).items() if key not in removed}
    file.write_text(json.dumps({**fields, **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    """Put what `change` makes of the tensors of model.safetensors in their place."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def of(folder: Path, **overrides: Any) -> ModelConfig:
    """The configuration of `model=pretrained model.path=FOLDER`."""
    return ModelConfig(name="m", path=str(folder), **overrides)

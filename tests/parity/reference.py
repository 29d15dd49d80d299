"""The single-process truth: a plain Hugging Face model, one document at a time."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.model.weights import persistent_buffers

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT_OSS = {
    "head_dim": 16,
    "sliding_window": 7,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    },
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama_deep": {"model_type": "llama", "num_hidden_layers": 5},
    "llama_4kv": {"model_type": "llama", "num_key_value_heads": 4},
    "llama_uneven": {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
    "llama_mha_tied": {"model_type": "llama", "num_key_value_heads": 8, "tie_word_embeddings": True},
    "llama_tied_deep": {"model_type": "llama", "num_key_value_heads": 8, "tie_word_embeddings": True, "num_hidden_layers": 5},
    "mistral": {"model_type": "mistral", "sliding_window": 11},
    "mistral_wide": {"model_type": "mistral", "sliding_window": 500},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "pad_token_id": None,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": None,
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "pad_token_id": None},
    "olmo2": {"model_type": "olmo2", "pad_token_id": None},
    "phi3": {
        "model_type": "phi3", "sliding_window": 11, "pad_token_id": None, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "granite": {
        "model_type": "granite", "embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
        "logits_scaling": 3.0, "attention_bias": True, "mlp_bias": True,
    },
    "glm4": {"model_type": "glm4", "head_dim": 16, "pad_token_id": None, "eos_token_id": 1},
    "cohere2": {
        "model_type": "cohere2", "sliding_window": 7, "num_hidden_layers": 3, "logit_scale": 0.3, "pad_token_id": None, "eos_token_id": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 13},
    "qwen2_moe": {
        "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "norm_topk_prob": True, "num_hidden_layers": 3,
    },
    "qwen3_moe_plain": {
        "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 5, "moe_intermediate_size": 24,
        "use_sliding_window": True, "sliding_window": 11,
    },
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "num_hidden_layers": 5, "mlp_only_layers": [0, 2],
    },
    "qwen2_moe_mixed": {
        "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56, "num_hidden_layers": 4, "decoder_sparse_step": 2,
    },
    "dots1": {
        "model_type": "dots1", "head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": 11, "max_window_layers": 2,
    },
    "dots1_plain": {
        "model_type": "dots1", "head_dim": 16, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 40, "attention_bias": True, "sliding_window": None,
    },
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 2, **GPT_OSS},
    "gpt_oss_dense": {"model_type": "gpt_oss_dense", "num_local_experts": 1, "num_experts_per_tok": 1, **GPT_OSS},
    "rope_linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "rope_dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "rope_yarn": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "rope_llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


STRUCTURAL = ("olmo2", "phi3", "granite", "glm4", "cohere2")
"""Whose layers are read by their modules (model/families/structural.py)."""
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "dots1")
EAGER = ("gemma2", "gpt_oss", "gpt_oss_dense")
"""Whose attention has more than SDPA computes."""


def hf_config(family: str):
    fields = {**BASE, **FAMILIES[family]}
    if family == "gpt_oss_dense":
        from efflaunch.tests.parity.gpt_oss_dense import register

        register()
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def reference_model(family: str, dtype: torch.dtype):
    """Random weights everywhere, norms and biases included, so that no gradient is trivially right."""
    torch.manual_seed(1234)
    config = hf_config(family)
    # Its grouped products know no float64; the loop over experts is what they stand for.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager" if family in EAGER else "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, bias in persistent_buffers(model).items():
            assert name.endswith("e_score_correction_bias")
            bias.add_(torch.randn_like(bias) * 0.2)
    return model.train()


def reference_loss(model, documents, targets, z_loss: float = 0.0, router=(0.0, 0.0), capacity=None):
    """Mean loss over all target tokens; each document is its own forward.

    `router`: weights of balance and z-loss of its routers. `capacity`: factor of the rows that an expert takes of a document.
    """
    if capacity is not None:
        with _capacity(model, capacity) as dropped:
            loss = reference_loss(model, documents, targets, z_loss, router)
        assert sum(dropped) > 0, "nothing is dropped: the row shows nothing"
        return loss
    if any(router):
        with _router_logits(model) as logits:
            loss = reference_loss(model, documents, targets, z_loss)
        return loss + sum(_router_loss(parts, *router) for parts in logits.values())
    total, count = 0.0, 0
    for tokens, wanted in zip(documents, targets, strict=True):
        rotary = model.model.rotary_emb
        if hasattr(rotary, "max_seq_len_cached"):  # "dynamic" tables remember the longest document seen: forget it
            rotary.__init__(model.config)
        ids = torch.as_tensor(tokens).unsqueeze(0)
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        total = total + F.cross_entropy(logits, torch.as_tensor(wanted), ignore_index=-100, reduction="sum")
        keep = torch.as_tensor(wanted) != -100
        total = total + z_loss * logits[keep].logsumexp(-1).square().sum()
        count += int(keep.sum())
    return total / count


@contextmanager
def _capacity(model, factor):
    """Routers that weigh nothing what an expert has no room for, the earliest tokens first; how many rows those are."""
    dropped, hooks = [], []

    def drop(module, inputs, output):
        logits, weights, chosen = output
        limit, taken, kept = math.ceil(factor * chosen.numel() / logits.shape[1]), Counter(), []
        for token in chosen.tolist():
            kept.append([taken[expert] < limit for expert in token])
            taken.update(token)
        dropped.append(sum(row.count(False) for row in kept))
        return logits, weights * torch.tensor(kept, dtype=weights.dtype).view_as(weights), chosen

    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            router = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
            hooks.append(router.register_forward_hook(drop))
    yield dropped
    for hook in hooks:
        hook.remove()


@contextmanager
def _router_logits(model):
    """(logits, chosen) of every router's forwards within, by layer."""
    seen, hooks = {}, []
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        router = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
        keep = seen.setdefault(index, [])
        hooks.append(router.register_forward_hook(lambda module, inputs, output, keep=keep: keep.append((output[0], output[2]))))
    yield seen
    for hook in hooks:
        hook.remove()


def _router_loss(parts, balance, z):
    """Of one layer, over all its tokens at once: by the definitions of Switch Transformer and ST-MoE."""
    logits, chosen = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shares = F.one_hot(chosen, logits.shape[1]).sum((0, 1)) / chosen.numel()
    even = logits.shape[1] * (shares * wide.softmax(-1).mean(0)).sum()
    return balance * even + z * wide.logsumexp(-1).square().mean()


def lift_to_float64() -> None:
    """Hugging Face computes norms, rotary tables and eager softmax in float32 even in float64 models; here they use the input's dtype.

    Both sides of a float64 comparison call this, so its bound can be 1e-10. Idempotent; nothing changes for other dtypes.
    """
    import importlib

    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3", *STRUCTURAL, *MIXTURES):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name, kind in vars(module).items():
            if isinstance(kind, type) and name.endswith("RMSNorm"):
                kind.forward = _wide_only(_gemma_norm if family.startswith("gemma") else _norm, kind.forward)
            if isinstance(kind, type) and name.endswith("RotaryEmbedding"):
                kind.forward = _rotary_forward(kind.forward, copies=1 if family == "gpt_oss" else 2, neighbours=family == "cohere2")
            if isinstance(kind, type) and name == "Cohere2LayerNorm":
                kind.forward = _wide_only(_layer_norm, kind.forward)
            # gpt-oss weighs in the precision of its logits.
            if isinstance(kind, type) and name.endswith("TopKRouter") and family != "gpt_oss":
                kind.forward = _wide_only(_router, kind.forward)
            if isinstance(kind, type) and name.endswith("TopkRouter"):
                kind.forward = _wide_only(_sigmoid_router, kind.forward)
        if hasattr(module, "eager_attention_forward") and family == "gemma2":
            module.eager_attention_forward = _eager
        if family == "cohere2":
            module.apply_rotary_pos_emb = partial(_wide_rotation, module.rotate_half)


def _norm(self, x):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


def _layer_norm(self, x):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), None, self.variance_epsilon).to(x.dtype)


def _wide_rotation(rotate_half, q, k, cos, sin, unsqueeze_dim=1):
    """Cohere 2's, which turns in float32 whatever comes, but for what is wider."""
    wide, (cos, sin) = torch.promote_types(q.dtype, torch.float32), (table.unsqueeze(unsqueeze_dim) for table in (cos, sin))
    q_wide, k_wide = q.to(wide), k.to(wide)
    return (q_wide * cos + rotate_half(q_wide) * sin).to(q.dtype), (k_wide * cos + rotate_half(k_wide) * sin).to(q.dtype)


def _router(self, hidden_states):
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, chosen = probabilities.topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(logits.dtype), chosen


def _wide_only(wide, forward):
    """Lifts a module for float64 alone: in others tests compare with transformers' own bits, order and number of launches."""
    if getattr(forward, "is_lifted", False):
        return forward

    def lifted(self, hidden_states):
        return (wide if hidden_states.dtype == torch.float64 else forward)(self, hidden_states)

    lifted.is_lifted = True
    return lifted


def _sigmoid_router(self, hidden_states):
    """DeepSeek-V3's, as transformers has it but for float32 where the input is wider; token by token for the choice."""
    x = hidden_states.reshape(-1, self.hidden_dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), self.weight.to(wide))
    scores = logits.sigmoid()
    wanted, size = scores + self.e_score_correction_bias, self.num_experts // self.num_group
    chosen = []
    for row in wanted.detach():
        groups = sorted(range(self.num_group), key=lambda g: -sum(sorted(row[g * size : (g + 1) * size].tolist())[-2:]))[: self.topk_group]
        allowed = [expert for group in groups for expert in range(group * size, (group + 1) * size)]
        chosen.append(sorted(allowed, key=lambda expert: -float(row[expert]))[: self.top_k])
    chosen = torch.tensor(chosen, dtype=torch.int64).view(-1, self.top_k)
    weights = scores.gather(1, chosen)
    if self.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return logits, weights * self.routed_scaling_factor, chosen


def _gemma_norm(self, x):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (wide * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)


def _rotary_forward(original, copies, neighbours=False):
    if getattr(original, "lifted", False):
        return original

    @torch.no_grad()
    def forward(self, x, position_ids, layer_type=None):
        if x.dtype != torch.float64:
            return original(self, x, position_ids, *([] if layer_type is None else [layer_type]))
        original(self, x, position_ids, *([] if layer_type is None else [layer_type]))  # lets "dynamic" update its table
        prefix = "" if layer_type is None else f"{layer_type}_"
        angles = position_ids[..., None].double() * getattr(self, f"{prefix}inv_freq").double()
        both = angles.repeat_interleave(2, -1) if neighbours else torch.cat([angles] * copies, -1)
        scaling = getattr(self, f"{prefix}attention_scaling")
        return both.cos() * scaling, both.sin() * scaling

    forward.lifted = True
    return forward


def _eager(module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, **kwargs):
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights

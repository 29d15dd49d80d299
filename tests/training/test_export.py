"""Exported checkpoints load with from_pretrained and give the trained model's own logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.errors import CheckpointError
from efflaunch.model.export import export, plan_shards
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.tests.ranks import RankPool
from efflaunch.training.config import Dtype
from efflaunch.training.optimizers.adamw import build_optimizer
from efflaunch.training.optimizers.config import OptimConfig

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, **SIZES},
    "gemma3-tied": {"model_type": "gemma3_text", **SIZES},
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        **SIZES,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [0, 1], "pad_token_id": None, **SIZES},
    "olmo3": {"model_type": "olmo3", "sliding_window": 4, "pad_token_id": None, **SIZES},
    "phi3": {
        "model_type": "phi3", "pad_token_id": None, "eos_token_id": 1, "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2, "partial_rotary_factor": 0.5, "rope_theta": 1e4,
        },
        **{name: size for name, size in SIZES.items() if name != "head_dim"}, "hidden_size": 32,
    },
    "cohere2": {"model_type": "cohere2", "sliding_window": 4, "pad_token_id": None, "eos_token_id": 1, **SIZES, "head_dim": 4},
    "stablelm": {"model_type": "stablelm", **SIZES, "hidden_size": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **SIZES},
    "qwen2_moe": {
        "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20, **SIZES,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True, **SIZES,
    },
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, **SIZES},
    "dots1": {
        "model_type": "dots1", "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "first_k_dense_replace": 1, "sliding_window": None, **SIZES,
    },
}  # fmt: skip
EXPERTS = {
    "mixtral": ("num_local_experts", "block_sparse_moe.experts.3.w3.weight", (24, 16)),
    "qwen2_moe": ("num_experts", "mlp.experts.5.up_proj.weight", (12, 16)),
    "qwen3_moe": ("num_experts", "mlp.experts.7.up_proj.weight", (8, 16)),
    "gpt_oss": ("num_local_experts", "mlp.experts.gate_up_proj", (4, 16, 48)),
    "dots1": ("n_routed_experts", "mlp.experts.3.up_proj.weight", (8, 16)),
}
"""The field that counts experts in every version's config.json; a tensor below a layer, and its shape."""


OLD: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e4, "rope_scaling": None},
    "qwen3": {"rope_theta": 1e4, "rope_scaling": None},
    "llama-tied": {"rope_theta": 1e4, "rope_scaling": None, "tie_word_embeddings": True},
    "gemma3-tied": {"rope_theta": 1e6, "rope_scaling": None, "rope_local_base_freq": 1e4, "layer_types": ["sliding_attention"] * 2},
    "llama-yarn": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "smollm3": {"rope_theta": 2e6, "rope_scaling": None, "no_rope_layers": [0, 1]},
    "olmo3": {"rope_theta": 5e5, "rope_scaling": None, "layer_types": ["sliding_attention"] * 2},
    "phi3": {
        "rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
        "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5,
    },
    "cohere2": {"rope_theta": 1e4, "rope_scaling": None, "layer_types": ["sliding_attention"] * 2, "logit_scale": 0.0625},
    "stablelm": {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.25},
    "mixtral": {"rope_theta": 1e6, "rope_scaling": None, "num_local_experts": 4},
    "qwen2_moe": {"rope_theta": 1e4, "rope_scaling": None, "num_experts": 6},
    "qwen3_moe": {"rope_theta": 1e4, "rope_scaling": None, "num_experts": 8, "num_local_experts": 8},
    "gpt_oss": {
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_local_experts": 4,
    },
    "dots1": {"rope_theta": 1e4, "rope_scaling": None, "n_routed_experts": 4},
}  # fmt: skip
"""What transformers 4.57 reads in config.json, in its own words."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def _train_and_save(run_dir: Path, fields: dict[str, Any], steps: tuple[int, ...], metadata: dict[str, Any]) -> Tensor:
    """One update on sharded weights, a checkpoint per step; logits of the last."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(fields)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.float32)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, OptimConfig(name="test", lr=0.05))
    engine = CheckpointEngine(CheckpointConfig(name="test"), run_dir / "checkpoints", state=Fsdp2State(model, optimizer), metadata=metadata)
    for step in steps:
        model(_ids(), use_cache=False).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.save(step, {})
        engine.wait()
    with torch.no_grad():
        return model(_ids(), use_cache=False).logits.clone()


def _ids() -> Tensor:
    return torch.arange(12).reshape(2, 6) * 3 % 40


def _exported_logits(path: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(_ids(), use_cache=False).logits.float()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_gives_the_trained_logits(pool: RankPool, tmp_path: Path, name: str, ranks: int) -> None:
    from transformers import AutoConfig

    fields = dict(MODELS[name])
    saved = AutoConfig.for_model(**fields, use_cache=False).to_dict()
    logits = pool.run(_train_and_save, tmp_path / "run", fields, (1,), {"hf_config": saved}, ranks=ranks)[0]
    report = export(tmp_path / "run", tmp_path / "out", dtype=Dtype.FLOAT32)
    assert torch.equal(_exported_logits(tmp_path / "out"), logits)
    assert (report.step, report.num_files, report.tokenizer) == (1, 1, None)
    assert report.num_bytes == 4 * report.num_parameters
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    reloaded = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    if name == "phi3":  # version 4 asks for `type`, which version 5 keeps beside its own name
        assert reloaded["rope_parameters"].pop("type") == reloaded["rope_parameters"]["rope_type"]
    assert {key for key in saved if reloaded[key] != saved[key]} <= {"architectures", "dtype", "use_cache", "_name_or_path"}
    assert config["use_cache"] is True
    assert {key: config.get(key) for key in OLD[name]} == OLD[name] and config["torch_dtype"] == "float32"
    assert config["dtype"] == "float32" and config["architectures"][0].endswith("ForCausalLM")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_have_the_names_of_published_files(tmp_path: Path, name: str) -> None:
    from safetensors import safe_open

    count, tensor, shape = EXPERTS[name]
    fields = dict(MODELS[name])
    logits = _train_and_save(tmp_path / "run", fields, (1,), {"hf_config": fields})
    export(tmp_path / "run", tmp_path / "out", dtype=Dtype.FLOAT32, max_shard_bytes=4000)
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    stored = f"model.layers.1.{tensor}"
    with safe_open(tmp_path / "out" / weight_map[stored], framework="pt") as file:
        assert tuple(file.get_slice(stored).get_shape()) == shape
    fused = {name for name in weight_map if name.endswith("experts.gate_up_proj")}
    assert len(fused) == (2 if stored in fused else 0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())[count] == fields[count]
    assert torch.equal(_exported_logits(tmp_path / "out"), logits)


def test_a_bias_that_moves_in_thousandths_is_not_rounded(tmp_path: Path) -> None:
    """In bfloat16 a bias of a quarter would know no step of 0.001."""
    from safetensors.torch import load_file

    _train_and_save(tmp_path / "run", MODELS["dots1"], (1,), {"hf_config": MODELS["dots1"]})
    report = export(tmp_path / "run", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    bias = tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32 and all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert report.num_bytes == 2 * report.num_parameters + 2 * bias.numel()


def _save_llama(folder: Path, steps: tuple[int, ...] = (1,), **metadata: Any) -> Tensor:
    torch.manual_seed(0)
    return _train_and_save(folder, MODELS["llama"], steps, {"hf_config": MODELS["llama"], **metadata})


def test_several_files_with_an_index_and_bfloat16_rounded_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _save_llama(tmp_path / "run")
    whole = export(tmp_path / "run", tmp_path / "whole", dtype=Dtype.FLOAT32)
    progress: list[tuple[int, int]] = []
    split = export(tmp_path / "run", tmp_path / "split", max_shard_bytes=2000, on_progress=lambda *done: progress.append(done))
    assert split.num_files > 3 and split.num_bytes == 2 * whole.num_parameters
    assert len(progress) == split.num_files and progress[-1] == (split.num_bytes, split.num_bytes)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == split.num_bytes
    for name, exact in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "split" / index["weight_map"][name])[name], exact.bfloat16()), name
    _exported_logits(tmp_path / "split")


def test_a_step_can_be_chosen_and_missing_ones_are_named(tmp_path: Path) -> None:
    _save_llama(tmp_path / "run", (1, 2))
    assert export(tmp_path / "run", tmp_path / "newest").step == 2
    assert export(tmp_path / "run", tmp_path / "first", step=1).step == 1
    with pytest.raises(CheckpointError, match=r"checkpoints of steps: 1, 2; expected a whole checkpoint of step 3"):
        export(tmp_path / "run", tmp_path / "third", step=3)
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "__0_0.distcp").write_bytes(b"")
    assert export(tmp_path / "run", tmp_path / "whole").step == 1
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has 0 bytes"):
        export(tmp_path / "run", tmp_path / "third", step=2)
    with pytest.raises(CheckpointError, match=r"steps: none; expected a whole checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_an_output_in_use_or_in_the_way_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    _save_llama(tmp_path / "run")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="found a directory with files in it"):
        export(tmp_path / "run", tmp_path / "used")
    with pytest.raises(CheckpointError, match="Not a directory"):
        export(tmp_path / "run", tmp_path / "used" / "mine.txt" / "out")
    for inner in ("out", "step-00000009", "../checkpoints/out"):
        with pytest.raises(CheckpointError, match="found a place among the run's checkpoints"):
            export(tmp_path / "run", tmp_path / "run" / "checkpoints" / inner)
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "run", tmp_path / "empty").num_files == 1
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"] and not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_without_a_model_configuration_is_refused(tmp_path: Path) -> None:
    _train_and_save(tmp_path / "run", MODELS["llama"], (1,), {})
    with pytest.raises(CheckpointError, match=r"state.json: found no model configuration"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("as_file", [True, False])
def test_the_tokenizer_comes_along(tmp_path: Path, as_file: bool) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer").mkdir()
    Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    source = tmp_path / "tokenizer" / ("tokenizer.json" if as_file else "")
    _save_llama(tmp_path / "run", tokenizer=str(source))
    assert export(tmp_path / "run", tmp_path / "out").tokenizer == str(source)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["b", "a"]) == [1, 0]


def test_a_tokenizer_that_is_not_here_is_reported_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _save_llama(tmp_path / "run", tokenizer="nobody/no-such-tokenizer")
    assert export(tmp_path / "run", tmp_path / "out").tokenizer is None


def test_files_are_filled_in_order_up_to_the_limit() -> None:
    assert plan_shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    assert plan_shards({"a": 3, "b": 3}, 6) == {"model.safetensors": ["a", "b"]}

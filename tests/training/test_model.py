"""Building and filling the model: weights do not depend on the layout, and come whole from safetensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.memory.policy import MemoryPolicy
from efflaunch.model.build import build_model
from efflaunch.model.config import ModelConfig
from efflaunch.model.families import layer_adapter
from efflaunch.model.weights import load_weights
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.reference import hf_config, reference_model
from efflaunch.tests.ranks import RankPool

KEEP = MemoryPolicy(graph=True)


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def _build(family, seed, path=None):
    topology = build_topology(replicate=1, device="cpu")
    model = build_model(
        hf_config(family), KEEP, topology.mesh, device=torch.device("cpu"), compute_dtype=torch.float32, seed=seed, loss_chunk_tokens=8
    )
    if path is not None:
        load_weights(model, ModelConfig(name="t", path=path), seed)
    whole = {name: np.array(parameter.full_tensor().detach()) for name, parameter in model.named_parameters()}
    tables = {name: np.array(buffer) for name, buffer in model.named_buffers()}
    return (whole, tables) if dist.get_rank() == 0 else None


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama_mha_tied"])
def test_random_weights_depend_on_the_seed_only(pool, family):
    one, two = pool.run(_build, family, 3, ranks=1)[0], pool.run(_build, family, 3, ranks=2)[0]
    other = pool.run(_build, family, 4, ranks=1)[0]
    for name, weight in one[0].items():
        np.testing.assert_array_equal(weight, two[0][name])
        if weight.ndim == 2:
            assert not np.array_equal(weight, other[0][name])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "rope_yarn"])
def test_initialisation_is_hugging_faces(pool, family):
    """Same constants, same spread, same rotary tables as a model Hugging Face initialises."""
    whole, tables = pool.run(_build, family, 0, ranks=2)[0]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(hf_config(family))
    for name, parameter in theirs.named_parameters():
        want, got = parameter.detach().numpy(), whole[name]
        if want.std() == 0:
            np.testing.assert_array_equal(got, want)
        else:
            # 1,024 samples and more: five standard errors.
            assert abs(got.std() / want.std() - 1) < 0.16 and abs(got.mean()) < 0.16 * got.std(), name
    for name, buffer in theirs.named_buffers():
        np.testing.assert_allclose(tables[name], buffer.numpy(), rtol=1e-6)


def test_weights_from_safetensors_shard_by_shard(pool, tmp_path):
    model = reference_model("qwen3", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, _ = pool.run(_build, "qwen3", 0, str(tmp_path), ranks=2)[0]
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(whole[name], parameter.detach().numpy())


@pytest.mark.parametrize(
    ("saved", "message"),
    [("nothing", "neither model.safetensors nor model.safetensors.index.json"), ("llama_4kv", "of shape"), ("gemma2", "no tensor for")],
)
def test_weights_of_another_model_are_refused(pool, tmp_path, saved, message):
    if saved == "nothing":
        hf_config("llama").save_pretrained(tmp_path)
    else:
        reference_model(saved, torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        pool.run(_build, "qwen2" if saved == "gemma2" else "llama", 0, str(tmp_path), ranks=1)


def test_unknown_family_names_the_adapter_to_write():
    with pytest.raises(ConfigError, match=r"model/families/opt_facts\.py"):
        layer_adapter(torch.nn.Module(), "opt")


def test_attention_dropout_is_refused():
    config = hf_config("llama")
    config.attention_dropout = 0.1
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"model\.extra\.attention_dropout=0\.0"):
        layer_adapter(model.model.layers[0], "llama")

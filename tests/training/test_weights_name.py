"""Weights are named by what is in their files: reference scores are of them, not of a path."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.model.weights import weights_fingerprint
from efflaunch.training.objectives.build import initial_weights


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {"a": torch.arange(6000, dtype=torch.float32), "b": torch.ones(3, 5), "empty": torch.zeros(0)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_place_and_time_do_not_matter(folder, tmp_path):
    name = weights_fingerprint(str(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(moved / "model.safetensors", (1, 1))
    (moved / "README.md").write_text("x")
    assert weights_fingerprint(str(moved)) == name


@pytest.mark.parametrize("tensor", ["a", "b"])
@pytest.mark.parametrize("end", [0, -1])
def test_a_number_at_an_end_of_any_tensor_matters(folder, tensor, end):
    name = weights_fingerprint(str(folder))
    tensors = {"a": torch.arange(6000, dtype=torch.float32), "b": torch.ones(3, 5), "empty": torch.zeros(0)}
    tensors[tensor].view(-1)[end] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights_fingerprint(str(folder)) != name


def test_the_model_config_matters_and_a_missing_file_is_named(folder):
    name = weights_fingerprint(str(folder))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert weights_fingerprint(str(folder)) != name
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="neither model.safetensors"):
        weights_fingerprint(str(folder))


def test_a_run_names_its_first_weights_by_content_or_seed(folder, tmp_path):
    config = compose(["+experiment=quickstart"])
    model, train = config.model, config.train
    seeded = initial_weights(config)
    assert initial_weights(replace(config, model=replace(model, name="other"))) == seeded, "a name is only shown"
    assert initial_weights(replace(config, train=replace(train, seed=train.seed + 1))) != seeded
    loaded = replace(config, model=replace(model, path=str(folder), vocab_size=None))
    moved = replace(config, model=replace(model, vocab_size=None, path=str(shutil.copytree(folder, tmp_path / "moved"))))
    assert initial_weights(loaded) == initial_weights(moved) != seeded
    assert initial_weights(replace(loaded, train=replace(train, seed=train.seed + 1))) == initial_weights(loaded)
    assert initial_weights(replace(loaded, model=replace(loaded.model, rope_theta=1e7))) != initial_weights(loaded)


OVERRIDES = [
    {"rope_theta": 1e7},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"max_positions": 4096},
    {"vocab_size": 500},
    {"extra": {"rms_norm_eps": 1e-3}},
    {"extra": {"tie_word_embeddings": False}},
]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: "+".join(override))
def test_every_override_makes_another_model_of_the_same_files(folder, override):
    config = compose(["+experiment=quickstart"])
    loaded = replace(config, model=replace(config.model, path=str(folder), vocab_size=None))
    changed = replace(loaded, model=replace(loaded.model, **override))
    assert initial_weights(changed) != initial_weights(loaded)
    assert initial_weights(replace(changed, train=replace(changed.train, dtype="float64"))) != initial_weights(changed)
    # Rows for added tokens are made by the seed; nothing else of a model from files is.
    other_seed = initial_weights(replace(changed, train=replace(changed.train, seed=changed.train.seed + 1)))
    assert (other_seed != initial_weights(changed)) == ("vocab_size" in override)

"""Losses and gradients of model directories in every form, against Hugging Face on the same files: float64, 1e-10."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.model.model_check import check_weights
from efflaunch.parallel.sequence.solve import solve_static
from efflaunch.tests.model.model_ranks import losses, weights
from efflaunch.tests.model.small import edit_config, edit_weights, of, save_model
from efflaunch.tests.parity.reference import lift_to_float64, reference_loss
from efflaunch.tests.ranks import RankPool

LENGTHS = (90, 5, 64, 18)
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
THETA = {"rope_theta": 1e4}


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def documents():
    generator = np.random.default_rng(7)
    tokens = [generator.integers(0, 97, length) for length in LENGTHS]
    return tokens, [np.append(each[1:], -100) for each in tokens]


def theirs(folder: Path, **config_fields: object) -> tuple[float, dict[str, torch.Tensor]]:
    """Hugging Face's own: the file as it is, or with fields of its config set by hand."""
    lift_to_float64()
    config = AutoConfig.from_pretrained(folder)
    for name, value in config_fields.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64).train()
    loss = reference_loss(model, *documents())
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


def gemma3_of_old(folder: Path) -> Path:
    """Gemma 3 as its first files were: flat rotary fields."""
    save_model(folder, "gemma3_text")
    edit_config(folder, "rope_parameters", rope_theta=1e6, rope_local_base_freq=1e4)
    return folder


def without_prefix(folder: Path) -> Path:
    save_model(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    return folder


def head_alone(folder: Path) -> Path:
    save_model(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda t: {{"model.embed_tokens.weight": "lm_head.weight"}.get(name, name): each for name, each in t.items()})
    return folder


def other_head(folder: Path) -> Path:
    save_model(folder)
    edit_config(folder, tie_word_embeddings=True)
    return folder


def cases(folder: Path):
    """(name, configuration, the same by Hugging Face)."""
    plain, old = save_model(folder / "plain"), gemma3_of_old(folder / "old")
    long, head = save_model(folder / "long", rope_parameters=LONGROPE), other_head(folder / "head")
    yarn = save_model(
        folder / "yarn", max_position_embeddings=256, rope_parameters={**YARN, **THETA, "original_max_position_embeddings": 64}
    )
    local = {"rope_type": "default", "rope_theta": 1e4}
    linear = {"sliding_attention": local, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}
    asked = {**YARN, **THETA, "original_max_position_embeddings": 64}
    dynamic = {"rope_type": "dynamic", "factor": 4.0, **THETA}
    share = {"rope_type": "proportional", "partial_rotary_factor": 0.5, **THETA}
    scaled = of(old, rope_scaling={"type": "linear", "factor": 8}, rope_theta=5e5)
    yield "gemma3 of old, linear", scaled, theirs(old, rope_parameters=linear)
    yield "yarn, raised", of(plain, rope_scaling=YARN, max_positions=256), theirs(plain, rope_parameters=asked, max_position_embeddings=256)
    yield (
        "dynamic, raised",
        of(plain, rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_positions=256),
        theirs(plain, rope_parameters=dynamic),
    )
    yield (
        "yarn of a yarn",
        of(yarn, rope_scaling={"rope_type": "yarn", "factor": 8.0}),
        theirs(yarn, rope_parameters={**asked, "factor": 8.0}),
    )
    yield "proportional", of(plain, rope_scaling={**share, "rope_theta": None}), theirs(plain, rope_parameters=share)
    yield "longrope, file", of(long), theirs(long)
    yield "longrope, file raised", of(long, max_positions=512), theirs(long)
    yield "head of the file", of(head, extra={"tie_word_embeddings": False}), theirs(head)
    yield "no prefix", of(without_prefix(folder / "bare")), theirs(folder / "bare")
    yield "head alone", of(head_alone(folder / "alone")), theirs(folder / "alone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def table(folder):
    return list(cases(folder))


@pytest.mark.parametrize(("ranks", "ulysses"), [(1, 1), (2, 1)], ids=["one rank", "ring of two"])
def test_losses_and_gradients(pool, table, ranks, ulysses):
    plan = solve_static(LENGTHS, world_size=ranks, degree=ranks, ulysses=ulysses, tokens_per_rank=1000, linear_cost_tokens=100)
    found = pool.run(losses, [config for _, config, _ in table], *documents(), plan, ranks=ranks)[0]
    for (name, _, (loss, gradients)), (our_loss, ours) in zip(table, found, strict=True):
        assert our_loss == pytest.approx(loss, rel=1e-10), name
        for parameter, gradient in gradients.items():
            bound = 1e-10 * float(gradient.abs().max())
            np.testing.assert_allclose(ours[parameter], gradient.numpy(), rtol=0, atol=bound, err_msg=f"{name}: {parameter}")


def test_overrides_make_a_difference(table, folder):
    """The right values above are not those without the override."""
    values = {name: loss for name, _, (loss, _) in table}
    plain = theirs(folder / "plain")[0]
    assert len({round(values[name], 8) for name in ("yarn, raised", "dynamic, raised", "proportional")} | {round(plain, 8)}) == 4
    assert abs(values["gemma3 of old, linear"] - theirs(folder / "old")[0]) > 1e-6


def test_text_model_inside_a_larger_one(pool, tmp_path):
    save_model(tmp_path / "text", "gemma3_text")
    inner = json.loads((tmp_path / "text/config.json").read_text())
    tensors = load_file(tmp_path / "text/model.safetensors")
    for prefix in ("language_model.model.", "model.language_model."):
        folder = save_model(tmp_path / prefix, "gemma3_text")
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner, "vision_config": {}}))
        inside = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
        edit_weights(folder, lambda _, inside=inside: {**inside, "vision_tower.patch.weight": torch.ones(2)})
        assert any("vision_tower.patch.weight" in note for note in check_weights(of(folder)))
        whole = pool.run(weights, of(folder), 0, ranks=1)[0]
        assert all(np.array_equal(whole[name], tensor.numpy()) for name, tensor in tensors.items())


def test_vocabulary_grows_as_transformers_grows_it(pool, tmp_path):
    """Old rows stay; new ones have the mean and 1e-9 of the covariance of the old, whatever the layout."""
    folder = save_model(tmp_path, "llama", vocab_size=97)
    config = of(folder, vocab_size=600)
    assert any("token ids 97 to 599 are new" in note for note in check_weights(config))
    one, two = pool.run(weights, config, 3, ranks=1)[0], pool.run(weights, config, 3, ranks=2)[0]
    saved = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = saved[name].double().numpy(), one[name][97:].astype(np.float64)
        np.testing.assert_array_equal(one[name], two[name])
        np.testing.assert_array_equal(one[name][:97], saved[name].numpy())
        mean = old.mean(0)
        covariance = (old - mean).T @ (old - mean) / len(old)
        spread = (new - mean) / np.sqrt(1e-9)
        # 503 samples: the error of an entry is below 5 / sqrt(503) of the largest variance.
        assert np.abs(spread.T @ spread / len(new) - covariance).max() < 5 / np.sqrt(503) * covariance.diagonal().max() * 1.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_the_models_fault(pool, tmp_path, bad):
    folder = save_model(tmp_path)
    edit_weights(
        folder,
        lambda t: {**t, "model.layers.1.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"].index_fill(0, torch.tensor([40]), bad)},
    )
    with pytest.raises(Exception, match=r"NaN or infinite numbers in model\.layers\.1\.mlp\.up_proj\.weight"):
        pool.run(weights, of(folder), 0, ranks=2)


@pytest.mark.parametrize(("family", "zero"), [("llama", 0.0), ("gemma3_text", -1.0)])
def test_norms_of_zeros_are_the_models_fault(pool, tmp_path, family, zero):
    folder = save_model(tmp_path, family)
    edit_weights(folder, lambda t: {**t, "model.layers.0.input_layernorm.weight": torch.full((32,), zero)})
    with pytest.raises(Exception, match=r"zeros only in model\.layers\.0\.input_layernorm\.weight"):
        pool.run(weights, of(folder), 0, ranks=1)

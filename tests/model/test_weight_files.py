"""Headers of safetensors, indices and load plans: what loads, what is reported, and every way in which files do not make a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.model.hf_fields import hf_config_dict
from efflaunch.model.load_plan import HEAD, parameter_shapes
from efflaunch.model.model_check import check_weights
from efflaunch.model.plain_weights import is_quantised
from efflaunch.model.spec import model_spec
from efflaunch.model.weight_files import read_header, read_headers
from efflaunch.tests.model.small import FAMILIES, edit_config, edit_weights, of, save_model

BIASES = {"attention_bias": True, "mlp_bias": True}
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama with biases", "qwen3 with biases", "gemma2 with biases"])
def test_parameters_are_those_of_hugging_face(tmp_path: Path, family: str, tied: bool) -> None:
    name, _, biases = family.partition(" ")
    changes = ({**BIASES} if name == "llama" else {"attention_bias": True}) if biases else {}
    save_model(tmp_path, name, tie_word_embeddings=tied, **changes)
    config = of(tmp_path)
    fields = hf_config_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert parameter_shapes(model_spec(config)) == {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert check_weights(config) == []


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of model.safetensors, its data as they are."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    changed = change(json.loads(data[8 : 8 + length]))
    header = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: {**header, name: {**header[name], **changes}}


def cut(folder: Path, size: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size] if size > 0 else data + b"x" * -size)


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b"") and None, "a file of 0 bytes"),
    "a header cut off": (lambda f: cut(f, 100), "a file of 100 bytes with a header of"),
    "data cut off": (lambda f: cut(f, 20_000), "of which the header knows"),
    "data to spare": (lambda f: cut(f, -3), "more than it should have"),
    "a huge header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100) and None, "with a header of"),
    "no JSON": (lambda f: rewrite(f, lambda h: b"{" + b" " * 40), "Expecting property name"),
    "nested too deep": (lambda f: rewrite(f, lambda h: b"[" * 200_000), "recursion"),
    "no object": (lambda f: rewrite(f, lambda h: [1]), "a header that is no object"),
    "a name twice": (lambda f: rewrite(f, lambda h: b'{"a": {}, "a": {}}'), "'a' twice"),
    "no shape": (lambda f: rewrite(f, entry("model.norm.weight", shape=None)), "'model.norm.weight' described by"),
    "negative": (lambda f: rewrite(f, entry("model.norm.weight", shape=[-32])), "'model.norm.weight' described by"),
    "another shape": (lambda f: rewrite(f, entry("model.norm.weight", shape=[33])), "instead of 132"),
    "overlap": (lambda f: rewrite(f, entry("model.norm.weight", data_offsets=[0, 128])), "was to be expected"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGED[name]
    damage(save_model(tmp_path))
    with pytest.raises(ConfigError) as caught:
        check_weights(of(tmp_path))
    assert message in str(caught.value) and "model.safetensors" in str(caught.value)


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return found


def edit_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    index = index_of(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*-of-*.safetensors"))[0]


def duplicate(folder: Path) -> None:
    shards = sorted(folder.glob("*-of-*.safetensors"))
    inside = next(iter(read_header(shards[0])))
    from safetensors.torch import load_file

    save_file({**load_file(shards[1]), inside: load_file(shards[0])[inside]}, shards[1])


SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: first_shard(f).unlink(), "which model.safetensors.index.json lists"),
    "another place": (
        lambda f: edit_index(f, lambda m: {**m, "model.norm.weight": first_shard(f).name}),
        "where model.safetensors.index.json has it",
    ),
    "not in its shard": (lambda f: edit_index(f, lambda m: {**m, "more": first_shard(f).name}), "no more in"),
    "above the directory": (lambda f: edit_index(f, lambda m: {**m, "more": "../secret.safetensors"}), "no file of this directory"),
    "absolute": (lambda f: edit_index(f, lambda m: {**m, "more": "/etc/passwd"}), "no file of this directory"),
    "empty index": (lambda f: edit_index(f, lambda m: {}), "no weight_map"),
    "twice": (duplicate, "expected each tensor once"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "without model.safetensors.index.json"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_do_not_fit(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, shard="20KB")
    assert check_weights(of(tmp_path)) == []
    change, message = SHARDS[name]
    change(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_weights(of(tmp_path))
    assert message in str(caught.value)


def test_one_file_comes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    save_model(tmp_path, shard="20KB")
    single = save_model(tmp_path / "single")
    (single / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert {stored.file for stored in read_headers(tmp_path).values()} == {"model.safetensors"}


WRONG: dict[str, tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "biases config.json lacks": (
        {},
        lambda t: {
            **t,
            **{f"model.layers.{i}.self_attn.{n}_proj.bias": torch.ones(16 if n in "kv" else 32) for i in (0, 1) for n in "qkvo"},
        },
        "k_proj.bias and 7 more like it, which no part of the model reads",
        "+model.extra.attention_bias=true",
    ),
    "biases of three": (
        {},
        lambda t: {**t, **{f"model.layers.0.self_attn.{n}_proj.bias": torch.ones(16) for n in "qkv"}},
        "which no part of the model reads",
        "the config.json of these weights",
    ),
    "biases the files lack": (
        {},
        lambda t: t,
        "no tensor for model.layers.0.self_attn.q_proj.bias",
        "+model.extra.attention_bias=false",
    ),
    "norms of another family": (
        {},
        lambda t: {**t, f"{QUERY[:-7]}.q_norm.weight": torch.ones(8)},
        "q_norm.weight, which no part",
        "config.json",
    ),
    "more layers": (
        {},
        lambda t: {**t, "model.layers.2.mlp.up_proj.weight": torch.ones(1)},
        "model.layers.2.mlp.up_proj.weight",
        "config.json",
    ),
    "no head": (
        {},
        lambda t: {name: each for name, each in t.items() if name != HEAD},
        "no tensor for lm_head.weight",
        "tie_word_embeddings=true",
    ),
    "another shape": ({}, lambda t: {**t, "model.norm.weight": torch.ones(31)}, "model.norm.weight of shape [31]", "one model"),
    "fewer rows": ({}, lambda t: {**t, HEAD: torch.ones(96, 32)}, "lm_head.weight of shape [96, 32]; expected [97, 32]", "one model"),
    "two forms": ({}, lambda t: {**t, "norm.weight": torch.ones(32)}, "norm.weight for model.norm.weight", "in one form"),
    "float8": (
        {},
        lambda t: {**t, f"{QUERY}.weight": t[f"{QUERY}.weight"].to(torch.float8_e4m3fn)},
        "stored as F8_E4M3",
        "dequantise first",
    ),
    "whole numbers": ({}, lambda t: {**t, f"{QUERY}.weight": t[f"{QUERY}.weight"].to(torch.int8)}, "stored as I8", "dequantise first"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_are_not_this_model(tmp_path: Path, name: str) -> None:
    changes, change, message, hint = WRONG[name]
    save_model(tmp_path, **changes)
    edit_weights(tmp_path, change)
    if name == "biases the files lack":
        edit_config(tmp_path, attention_bias=True)
    with pytest.raises(ConfigError) as caught:
        check_weights(of(tmp_path))
    assert message in str(caught.value) and hint in caught.value.hint
    if hint.startswith("+model.extra.attention_bias"):
        assert check_weights(replace(of(tmp_path), extra={"attention_bias": hint.endswith("true")})) == []


@pytest.mark.parametrize(
    "suffix",
    ["weight_scale", "weight_scale_inv", "input_scale", "qweight", "qzeros", "g_idx", "scales", "weight_packed", "weight_shape", "SCB",
     "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "weight_zero_point", "weight_global_scale", "k_scale"],
)  # fmt: skip
def test_names_of_quantised_weights(tmp_path: Path, suffix: str) -> None:
    assert is_quantised(f"{QUERY}.{suffix}") and not is_quantised(f"{QUERY}.weight") and not is_quantised(f"{QUERY}.bias")
    save_model(tmp_path)
    edit_weights(tmp_path, lambda t: {**t, f"{QUERY}.{suffix}": torch.ones(2)})
    with pytest.raises(ConfigError, match="quantised weights") as caught:
        check_weights(of(tmp_path))
    assert "dequantise" in caught.value.hint


def test_an_adapter_beside_the_weights_is_said_not_to_be_read(tmp_path: Path) -> None:
    save_model(tmp_path)
    assert check_weights(of(tmp_path)) == []
    (tmp_path / "adapter_config.json").write_text("{}")
    (note,) = check_weights(of(tmp_path))
    assert note.startswith("model.path: adapter_config.json beside the weights: the adapter is not read")


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "mxfp4", "compressed-tensors", "torchao"])
def test_quantisation_in_config_json(tmp_path: Path, method: str) -> None:
    save_model(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ConfigError, match=rf"quantization_config in config.json \({method}\)"):
        model_spec(of(tmp_path))


def test_a_head_that_differs_from_a_tied_embedding(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    config = of(tmp_path)
    with pytest.raises(ConfigError, match="differs from the embedding") as caught:
        check_weights(config)
    assert "model.extra.tie_word_embeddings=false" in caught.value.hint
    assert check_weights(replace(config, extra={"tie_word_embeddings": False})) == []
    assert "head in the files is not read" in check_weights(replace(config, extra={"tie_word_embeddings": True}))[0]
    edit_weights(tmp_path, lambda t: {**t, HEAD: t["model.embed_tokens.weight"].clone()})
    assert check_weights(config) == []
    edit_weights(tmp_path, lambda t: {**t, HEAD: t[HEAD].double()})
    assert check_weights(config) == []


def test_what_is_no_part_of_the_model_is_reported(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_weights(tmp_path, lambda t: {**t, "v_head.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    edit_config(tmp_path, embedding_multiplier=12.0, pad_token_id=2, eos_token_id=[2, 3])
    notes = check_weights(of(tmp_path))
    assert any("1 tensors of the files are no part of this model and are not read: v_head.weight" in note for note in notes)
    assert any("no llama layer reads embedding_multiplier" in note for note in notes)
    assert any("+model.extra.pad_token_id=null" in note for note in notes)
    assert len(notes) == 3
    assert not any("pad_token_id" in note for note in check_weights(of(tmp_path, extra={"pad_token_id": None})))


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin alone", "use_safetensors=False"),
        (["adapter_model.safetensors", "adapter_config.json"], "an adapter", "merge_and_unload"),
        (["weights.safetensors"], "weights.safetensors without", "model.safetensors"),
        ([], "neither model.safetensors nor", "save_pretrained"),
    ],
)
def test_directories_without_weights(tmp_path: Path, files: list[str], message: str, hint: str) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        check_weights(of(tmp_path))
    assert message in str(caught.value) and hint in caught.value.hint


def test_a_vocabulary_grows_and_does_not_shrink(tmp_path: Path) -> None:
    config = of(save_model(tmp_path), vocab_size=96)
    with pytest.raises(ConfigError, match=r"model.vocab_size: found 96 beside .* whose vocabulary has 97"):
        model_spec(config)
    assert model_spec(replace(config, vocab_size=130)).vocab_size == 130


def test_no_torch_is_imported(tmp_path: Path) -> None:
    save_model(tmp_path)
    code = (
        "import sys; from efflaunch.model.config import ModelConfig; from efflaunch.model.model_check import check_weights; "
        f"print(check_weights(ModelConfig(name='m', path={str(tmp_path)!r}))); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", "[]"]

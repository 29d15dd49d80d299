"""Which frozen weights adapters belong to: the digest follows contents, and another base or scaling is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.model.adapters.base import adapter_identity, check_init_base, check_same_base, model_digest
from efflaunch.model.adapters.config import AdapterMethod
from efflaunch.model.config import ModelConfig
from efflaunch.model.spec import model_spec
from efflaunch.tests.parity.reference import hf_config

LORA = compose(["+experiment=quickstart", "adapter=lora"]).adapter
TINY = compose(["+experiment=quickstart"]).model
SPEC = model_spec(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of the same sizes, and a copy of the first."""
    root, paths = tmp_path_factory.mktemp("models"), []
    for name, seed in (("one", 0), ("other", 1), ("copy", 0)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(hf_config("llama")).save_pretrained(root / name)
        paths.append(str(root / name))
    return paths


def test_the_digest_is_of_contents(folders) -> None:
    one, other, copy = (model_digest(ModelConfig(name="m", path=path), 0, "bfloat16") for path in folders)
    assert one == copy and one != other
    assert one == model_digest(ModelConfig(name="m", path=folders[0]), 5, "bfloat16"), "a seed makes nothing here"
    assert model_digest(TINY, 0, "float32") != model_digest(TINY, 1, "float32")
    assert model_digest(TINY, 0, "float32") != model_digest(replace(TINY, hidden_size=512), 0, "float32")


def test_another_base_or_scaling_is_refused_on_resume() -> None:
    saved = adapter_identity(LORA, "abc", SPEC)
    check_same_base(saved, saved, TINY, 3)
    check_same_base(None, saved, TINY, 3)
    with pytest.raises(ConfigError, match="step 3.*other weights than those of this seed"):
        check_same_base(saved, {**saved, "base": "def"}, TINY, 3)
    packed = adapter_identity(replace(LORA, method=AdapterMethod.QLORA, quantized=["q_proj"]), "abc", SPEC)
    check_same_base(packed, packed, TINY, 3)
    with pytest.raises(ConfigError, match="matrices of another precision.*\n.*adapter=lora"):
        check_same_base(saved, packed, TINY, 3)
    with pytest.raises(ConfigError, match=r"adapter=qlora adapter.quantized=\[self_attn.q_proj\]"):
        check_same_base(packed, saved, TINY, 3)
    turned = adapter_identity(replace(LORA, dora=True), "abc", SPEC)
    check_same_base(turned, turned, TINY, 3)
    for before, now, hint in ((turned, saved, "adapter.dora=true"), (saved, turned, "adapter.dora=false")):
        with pytest.raises(ConfigError, match=f"(?s)magnitudes of their own.*{hint}"):
            check_same_base(before, now, TINY, 3)
    with pytest.raises(ConfigError, match="scaled by 2; now by 4"):
        check_same_base(saved, adapter_identity(replace(LORA, alpha=64.0), "abc", SPEC), TINY, 3)


def test_an_adapter_of_another_base_is_refused(folders) -> None:
    model = ModelConfig(name="m", path=folders[0])
    adapter = replace(LORA, init="somewhere")
    check_init_base(adapter, "abc", None, model, "abc")
    check_init_base(adapter, None, folders[2], model, "abc")
    check_init_base(adapter, None, "a/name-of-a-hub", model, "abc")
    for recorded, named in (("def", None), (None, folders[1])):
        with pytest.raises(ConfigError, match=r"adapter.init somewhere: found an adapter of .* whose weights are not those"):
            check_init_base(adapter, recorded, named, model, "abc")

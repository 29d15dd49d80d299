"""Adapters through peft's files: peft loads what is written with the same logits, and what it saves fills the same parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.model.adapters.base import model_digest
from efflaunch.model.adapters.lora import LoraFactors, insert_adapters
from efflaunch.model.adapters.merge import merge
from efflaunch.model.adapters.peft_files import load_adapter, write_adapter
from efflaunch.model.config import ModelConfig
from efflaunch.tests.model.adapters.test_peft_config import OURS
from efflaunch.tests.parity.reference import hf_config

IDS = torch.arange(40).view(2, 20)


def adapted(seed=0, config=OURS):
    """A plain model with random factors beside its matrices, and norms of its own."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config("llama"), dtype=torch.float32)
    insert_adapters(model, config, torch.float32)
    for module in model.modules():
        if isinstance(module, LoraFactors):
            module.initialise()
    return model


def disturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, position_ids=torch.arange(20).expand(2, -1), use_cache=False).logits


def test_peft_computes_what_the_merged_model_does(tmp_path) -> None:
    model = adapted()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad or "norm" in name}
    trained = disturbed(model)
    write_adapter(trained, tmp_path, OURS, base=None, digest="abc")
    plain = AutoModelForCausalLM.from_config(hf_config("llama"), dtype=torch.float32)
    plain.load_state_dict(base)
    before = logits(plain)
    peft = logits(PeftModel.from_pretrained(plain, tmp_path).eval())
    merge(base, trained, OURS.scaling)
    whole = AutoModelForCausalLM.from_config(hf_config("llama"), dtype=torch.float32)
    whole.load_state_dict(base)
    torch.testing.assert_close(peft, logits(whole), rtol=1e-4, atol=1e-4)
    assert float((peft - before).abs().max()) > 0.01, "the adapter does something"


def test_what_was_written_is_read_again(tmp_path) -> None:
    trained = disturbed(adapted())
    model = ModelConfig(name="m")
    write_adapter(trained, tmp_path, OURS, base=None, digest=model_digest(model, 7, "float32"))
    config, other = replace(OURS, init=str(tmp_path)), adapted(seed=1)
    load_adapter(other, config, model, 7, "float32")
    assert all(torch.equal(p, trained[name]) for name, p in other.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="whose weights are not those of this seed"):
        load_adapter(other, config, model, 8, "float32")

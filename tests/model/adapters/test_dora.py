"""The product through a magnitude against the same function by plain autograd; what peft makes of files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from efflaunch.model.adapters.dora import DoraProduct, row_norms
from efflaunch.model.adapters.lora import Factors
from efflaunch.model.adapters.merge import merge
from efflaunch.model.adapters.peft_files import load_adapter, write_adapter
from efflaunch.model.config import ModelConfig
from efflaunch.tests.model.adapters.test_magnitudes import DORA, started
from efflaunch.tests.model.adapters.test_peft_files import disturbed, logits
from efflaunch.tests.parity.peft_reference import our_name
from efflaunch.tests.parity.reference import hf_config

SHAPES = {"x": (5, 7), "weight": (4, 7), "bias": (4,), "a": (3, 7), "b": (4, 3), "magnitude": (4,)}


def operands():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for name, shape in SHAPES.items()}


def test_norms_are_those_of_the_sum() -> None:
    of = operands()
    norms = row_norms(of["weight"], Factors(of["a"], of["b"], 2.0))
    torch.testing.assert_close(norms, (of["weight"] + 2.0 * of["b"] @ of["a"]).norm(dim=1), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(row_norms(of["weight"].bfloat16()), of["weight"].bfloat16().float().norm(dim=1))
    gone = Factors(of["weight"][:1].detach(), -torch.ones(1, 1, dtype=torch.float64), 1.0)
    assert float(row_norms(of["weight"][:1].detach(), gone)) == pytest.approx(0.0, abs=1e-6), "nothing is left of the row, and no NaN"


def test_gradients_are_autograds_with_norms_as_constants() -> None:
    for values in (True, False):
        mine, plain = operands(), operands()
        out = DoraProduct.apply(*mine.values(), 2.0, values)
        whole = plain["weight"].detach() + 2.0 * plain["b"] @ plain["a"]
        want = (plain["x"] @ whole.T) * (plain["magnitude"] / whole.detach().norm(dim=1)) + plain["bias"]
        names, dy = ("x", "bias", "a", "b", "magnitude"), torch.arange(20, dtype=torch.float64).view(5, 4)
        got, expected = (torch.autograd.grad(y, [of[name] for name in names], dy) for y, of in ((out, mine), (want, plain)))
        for name, one, other in zip(names, got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)
        if values:
            torch.testing.assert_close(out, want)
        else:
            assert out.untyped_storage().nbytes() == 8, "no memory for values that nobody reads"


def test_in_bfloat16_the_model_starts_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, a = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 48), (300, 48), (3, 48)))
    b, wide = torch.zeros(300, 3, dtype=torch.bfloat16), row_norms(weight)
    magnitude = wide.bfloat16()
    of = [each.requires_grad_() for each in (x, weight, a, b, magnitude)]
    out = DoraProduct.apply(of[0], of[1], None, *of[2:], 2.0, True)
    assert magnitude.dtype is torch.bfloat16 and not torch.equal((magnitude / wide).bfloat16(), torch.ones(300).bfloat16())
    assert torch.equal(out, x @ weight.T), "B is zero, and every magnitude its row's norm"
    dy = torch.randn(5, 300, generator=generator).bfloat16()
    d_x, d_magnitude = torch.autograd.grad(out, (of[0], of[4]), dy)
    assert d_x.dtype is torch.bfloat16 and torch.equal(d_x, (dy @ weight).detach())
    want = (out.float() * dy.float()).sum(0) / wide
    torch.testing.assert_close(d_magnitude.float(), want.detach(), rtol=0.05, atol=0.02)


def test_a_magnitude_that_changed_is_multiplied_wide() -> None:
    """c is a share of two bfloat16 numbers: rounded once more it would be off by up to 1 / 512 of itself."""
    x, weight = torch.full((1, 1), 1.0, dtype=torch.bfloat16), torch.full((1, 1), 3.0, dtype=torch.bfloat16)
    none = torch.zeros(1, 1, dtype=torch.bfloat16)
    out = DoraProduct.apply(x, weight, None, none, none, torch.full((1,), 3.015625, dtype=torch.bfloat16), 1.0, True)
    assert float(out) == 3.015625


def test_peft_computes_what_the_merged_model_does_and_what_was_written_is_read_again(tmp_path) -> None:
    model = started()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad or "norm" in name}
    trained = disturbed(model)
    write_adapter(trained, tmp_path, DORA, base=None, digest="abc")
    plain, whole = (AutoModelForCausalLM.from_config(hf_config("llama"), dtype=torch.float32) for _ in range(2))
    plain.load_state_dict(base)
    before, peft = logits(plain), logits(PeftModel.from_pretrained(plain, tmp_path).eval())
    merge(base, trained, DORA.scaling)
    whole.load_state_dict(base)
    torch.testing.assert_close(peft, logits(whole), rtol=1e-4, atol=1e-4)
    assert float((peft - before).abs().max()) > 0.01, "the adapter does something"


def test_what_peft_saves_fills_the_magnitudes(tmp_path) -> None:
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "modules_to_save": ["norm"]}
    plain = AutoModelForCausalLM.from_config(hf_config("llama"))
    theirs = get_peft_model(plain, LoraConfig(**options, use_dora=True, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model = started()
    load_adapter(model, replace(DORA, init=str(tmp_path)), ModelConfig(name="m"), 7, "float32")
    want = {ours: p for name, p in theirs.get_base_model().named_parameters() if (ours := our_name(name)) is not None}
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert sum(name.endswith(".magnitude") for name in want) == 4 * hf_config("llama").num_hidden_layers

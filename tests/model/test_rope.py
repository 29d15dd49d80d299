"""Rotary tables have a column for every number of a head, are Hugging Face's own, and are right at any position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import _apply_rotary_emb
from transformers.models.llama.modeling_llama import rotate_half

from efflaunch.model.families.rope import BY_LENGTH, UNROTATED, rotary_tables
from efflaunch.tests.parity.reference import FAMILIES, hf_config, reference_model

PRODUCTS = ("mm", "matmul", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "dot", "linear", "einsum", "tensordot")
FAR = (0, 1, 65_537, 1_000_003, 4_194_301)
"""Positions; TF32 has 10 bits for each."""


@pytest.mark.parametrize("family", ["llama", "rope_yarn", "gemma3", "gpt_oss_dense", "smollm3"])
def test_tables_are_as_wide_as_a_head(family: str) -> None:
    model = reference_model(family, torch.float32)
    positions, lengths = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([3, 3, 3, 2, 2])
    head_dim = model.model.layers[0].self_attn.head_dim
    tables = rotary_tables(model.model.rotary_emb, torch.zeros(5, 64), positions, lengths)
    assert len(tables) == (2 if family in ("gemma3", "smollm3") else 1)
    for key, (cos, sin) in tables.items():
        assert key != UNROTATED or bool((cos == 1).all() and (sin == 0).all())
        assert cos.shape == sin.shape == (5, head_dim)
        assert torch.equal(cos[:3][:2], cos[3:]) and torch.equal(cos[:, : head_dim // 2], cos[:, head_dim // 2 :])


def test_gpt_oss_turns_the_halves_of_a_head_as_llama_does() -> None:
    rotary = reference_model("gpt_oss_dense", torch.float32).model.rotary_emb
    assert rotary.attention_scaling > 1.0  # YaRN's factor is in the table
    q, positions = torch.randn(9, 1, 16), torch.arange(9)
    half_cos, half_sin = (table[0].unsqueeze(1) for table in rotary(q, positions.unsqueeze(0)))
    assert half_cos.shape == (9, 1, 8)
    cos, sin = (table.unsqueeze(1) for table in rotary_tables(rotary, q, positions, torch.full((9,), 9))[None])
    assert torch.equal(q * cos + rotate_half(q) * sin, _apply_rotary_emb(q, half_cos, half_sin))


class NoProducts(TorchDispatchMode):
    """Fails where a matrix product is dispatched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in PRODUCTS, func
        return func(*args, **(kwargs or {}))


def rotary_of(family: str) -> Any:
    """Hugging Face's rotary module of a model, without its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(family))
    return type(model.model.rotary_emb)(model.config)


def angles_of(rotary: Any, key: str | None, length: int) -> tuple[torch.Tensor, float]:
    """The angles at FAR in float64, and the factor of the tables."""
    prefix, rope_type = ("", rotary.rope_type) if key is None else (f"{key}_", rotary.rope_type[key])
    frequencies, factor = getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")
    if rope_type in BY_LENGTH:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](rotary.config, "cpu", seq_len=torch.tensor(length))
    return torch.tensor(FAR, dtype=torch.float64).unsqueeze(-1) * frequencies.double(), factor


@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_product_makes_angles_and_far_positions_are_right(family: str) -> None:
    """The limit is float32's rounding of a product; TF32 would put position 1,000,003 at 999,936, whole turns away."""
    rotary, length = rotary_of(family), FAR[-1] + 1
    with NoProducts():
        tables = rotary_tables(rotary, torch.zeros(len(FAR), 64), torch.tensor(FAR), torch.full((len(FAR),), length))
    # That of layers without positions has no angles.
    tables.pop(UNROTATED, None)
    assert len(tables) == (2 if family == "gemma3" else 1)
    for key, (cos, sin) in tables.items():
        angles, factor = angles_of(rotary, key, length)
        limit = factor * (angles * 2.0**-23 + 1e-6)
        for table, exact in ((cos, angles.cos() * factor), (sin, angles.sin() * factor)):
            assert ((table[:, : angles.shape[1]].double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "rope_dynamic"])
def test_tables_are_hugging_faces(family: str) -> None:
    """Bit for bit where its module makes them on a CPU: a product of one term is exact in any form."""
    rotary, positions = rotary_of(family), torch.arange(100)
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.zeros(100, 64, dtype=dtype)
        found = rotary_tables(rotary, like, positions, torch.full((100,), 100))
        found.pop(UNROTATED, None)
        for key, tables in found.items():
            theirs = rotary(like, positions.unsqueeze(0), **({} if key is None else {"layer_type": key}))
            for table, whole in zip(tables, theirs, strict=True):
                if family == "cohere2":  # neighbours turn together: the adapter puts the table in their order
                    table = table[:, : table.shape[-1] // 2].repeat_interleave(2, -1)
                assert table.dtype == whole.dtype and torch.equal(table[:, : whole.shape[-1]], whole[0])
                assert table.dtype == (torch.float32 if family == "olmo2" else dtype)


def test_a_float64_model_has_float64_angles() -> None:
    rotary, positions = rotary_of("llama"), torch.tensor(FAR)
    cos, _ = rotary_tables(rotary, torch.zeros(len(FAR), 64, dtype=torch.float64), positions, positions + 1)[None]
    angles, _ = angles_of(rotary, None, 0)
    assert torch.equal(cos[:, : angles.shape[1]], angles.cos())


def test_a_product_would_be_found() -> None:
    with pytest.raises(AssertionError, match="mm"), NoProducts():
        torch.tensor([[1.0]]) @ torch.tensor([[1_000_003.0]])

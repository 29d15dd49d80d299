"""NF4: bytes read by another program are the same numbers; codes are torchao's; what is lost is as much as there; rows are alone."""

from __future__ import annotations

import pytest
import torch

from efflaunch.model.adapters.nf4 import LEVELS, byte_levels, pack, strips, unpack
from efflaunch.model.adapters.nf4_layout import STRIP_NUMBERS
from efflaunch.tests.parity.nf4_reference import read_nf4


def matrix(rows: int, columns: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (5, 48), (7, 200), (2, 64 * 300), (300, 4096)])
def test_numbers_are_those_that_the_bytes_say(rows: int, columns: int) -> None:
    weight = matrix(rows, columns)
    packed = pack(weight)
    wide = unpack(packed, columns, torch.float32, byte_levels())
    assert torch.equal(wide, torch.from_numpy(read_nf4(packed.numpy(), columns)))
    assert 0.08 < (wide - weight).norm() / weight.norm() < 0.1, "what 16 quantiles of a normal distribution lose"
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(unpack(packed, columns, dtype, byte_levels()), wide.to(dtype)), "rounded once"
    assert torch.equal(pack(weight[1:2]), packed[1:2]), "rows do not know of each other, so any rank packs its own"
    assert len(strips(300, 4096)) == -(-300 * 4096 // STRIP_NUMBERS) and strips(2, 2 * STRIP_NUMBERS) == [slice(0, 1), slice(1, 2)]


def test_codes_and_error_are_those_of_torchao() -> None:
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    weight = matrix(256, 1024)
    theirs, ours = nf4.to_nf4(weight, 64, 256), pack(weight)
    same = (theirs.quantized_data.view(256, -1) == ours[:, :512]).float().mean()
    assert same > 0.99, "codes differ only where a scale was rounded differently"
    error = [(wide - weight).norm().item() for wide in (theirs.get_original_weight(), unpack(ours, 1024, torch.float32, byte_levels()))]
    assert error[1] == pytest.approx(error[0], rel=0.01)


def test_zeros_and_numbers_that_are_levels_are_kept() -> None:
    weight = torch.zeros(3, 128)
    weight[1, :64] = torch.tensor(LEVELS).repeat(4)
    weight[1, 64:] = torch.tensor(LEVELS).repeat(4)
    wide = unpack(pack(weight), 128, torch.float32, byte_levels())
    assert torch.equal(wide, weight)
    assert byte_levels()[0x7F].tolist() == [0.0, 1.0] and byte_levels()[0xF0].tolist() == [1.0, -1.0]

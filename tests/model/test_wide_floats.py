"""Within the mode float32 is float64, forward and in backward; the code that asks for it is not changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efflaunch.model.proof.wide_floats import WideFloats


class Seen(torch.autograd.Function):
    """Notes in which precision backward's own products are."""

    dtypes: list[torch.dtype] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        Seen.dtypes.append(dy.float().dtype)
        return dy * 2


def test_what_asks_for_float32_gets_float64() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    with WideFloats():
        for wide in (x.float(), x.to(torch.float32), x.type(torch.float32), x.softmax(-1, dtype=torch.float32), torch.arange(3).float()):
            assert wide.dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert x.half().dtype == torch.float16 and torch.arange(3).dtype == torch.int64
    assert x.float().dtype == torch.float32


def norm(x: Tensor) -> Tensor:
    """An RMS norm as transformers' models write it: their own classes are made wide for good by other tests of a process."""
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_a_norm_is_as_exact_as_its_input() -> None:
    x = torch.randn(7, 64, dtype=torch.float64)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert float((norm(x) - exact).abs().max()) > 1e-10
    with WideFloats():
        assert float((norm(x) - exact).abs().max()) < 1e-14


def test_backward_is_within_as_well() -> None:
    Seen.dtypes.clear()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with WideFloats():
        Seen.apply(x).sum().backward()
    assert Seen.dtypes == [torch.float64] and x.grad is not None and x.grad.tolist() == [2.0] * 3

"""The chunked loss against plain cross-entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from efflaunch.training.loss import LossOptions, chunked_cross_entropy


def plain(hidden, weight, targets, scale, softcap, z_loss):
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    keep = targets != -100
    total = F.cross_entropy(logits[keep], targets[keep], reduction="sum") + z_loss * logits[keep].logsumexp(-1).square().sum()
    return total * scale


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (3.0, 0.0), (None, 0.01), (2.0, 0.01)])
def test_loss_and_gradients_equal_plain_cross_entropy(chunk, softcap, z_loss):
    torch.manual_seed(0)
    hidden, weight = torch.randn(31, 12).double(), torch.randn(53, 12).double()
    targets = torch.randint(0, 53, (31,))
    targets[torch.rand(31) < 0.3] = -100
    results = []
    for function in (
        lambda h, w: plain(h, w, targets, 0.25, softcap, z_loss),
        lambda h, w: chunked_cross_entropy(h, w, targets, scale=0.25, options=LossOptions(chunk, softcap, z_loss)),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_target_is_zero_loss_with_zero_gradients(rows):
    hidden, weight = torch.randn(rows, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((rows,), -100), scale=1.0, options=LossOptions(2))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_bfloat16_sums_the_weight_gradient_in_float32():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(4096, 8).bfloat16(), (torch.randn(16, 8) / 3).bfloat16(), torch.randint(0, 16, (4096,))
    w = weight.clone().requires_grad_()
    chunked_cross_entropy(hidden, w, targets, scale=1 / 4096, options=LossOptions(16)).backward()
    exact = weight.double().requires_grad_()
    plain(hidden.double(), exact, targets, 1 / 4096, None, 0.0).backward()
    # 256 chunks added up in bfloat16 would be off by percents.
    assert (w.grad.double() - exact.grad).abs().max() < 4e-3 * exact.grad.abs().max()


def test_logits_of_one_chunk_only_exist_at_a_time():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    hidden, weight = torch.randn(600, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with Largest() as largest:
        chunked_cross_entropy(hidden, weight, torch.zeros(600, dtype=torch.long), scale=1.0, options=LossOptions(10)).backward()
    assert largest.numel == max(10 * 500, 600 * 4)

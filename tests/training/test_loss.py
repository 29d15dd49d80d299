"""The chunked end of the model against plain norm, head and cross-entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from efflaunch.memory.arena.tracer import StorageTracer
from efflaunch.model.chunked_loss import Head, LossOptions, chunked_cross_entropy, chunked_log_probs, cross_entropy


class Norm(nn.Module):
    """RMSNorm with a bias, in float32 at least, as Hugging Face's: float32 temporaries and two parameters."""

    def __init__(self, width, dtype=torch.float64):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(width, dtype=dtype)) for _ in range(2))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype) + self.bias


def plain(x, norm, weight, targets, scale, softcap=None, z_loss=0.0, smoothing=0.0):
    logits = F.linear(norm(x), weight)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    keep = targets != -100
    total = F.cross_entropy(logits[keep], targets[keep], reduction="sum", label_smoothing=smoothing)
    return (total + z_loss * logits[keep].logsumexp(-1).square().sum()) * scale


def made(rows=31, width=12, vocabulary=53, dtype=torch.float64):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[torch.rand(rows) < 0.3] = -100
    return x, Norm(width, dtype), weight, targets


def gradients(function, x, norm, weight):
    """Loss and gradients through something before x, so that x is not a leaf."""
    before, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    norm.zero_grad()
    loss = function(before * 1.0, w)
    (3 * loss).backward()
    return loss.detach(), before.grad, w.grad, norm.weight.grad.clone(), norm.bias.grad.clone()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (3.0, 0.0), (None, 0.01), (2.0, 0.01)])
def test_loss_and_gradients_equal_plain_torch(chunk, softcap, z_loss, overwrite):
    x, norm, weight, targets = made()
    options = LossOptions(chunk, softcap, z_loss)
    want = gradients(lambda a, w: plain(a, norm, w, targets, 0.25, softcap, z_loss), x, norm, weight)
    got = gradients(
        lambda a, w: chunked_cross_entropy(a, norm, w, targets, scale=0.25, options=options, overwrite=overwrite), x, norm, weight
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (2.0, 0.01)])
def test_smoothed_labels_equal_plain_torch(chunk, softcap, z_loss):
    x, norm, weight, targets = made()
    options = LossOptions(chunk, softcap, z_loss)
    want = gradients(lambda a, w: plain(a, norm, w, targets, 0.25, softcap, z_loss, smoothing=0.1), x, norm, weight)
    got = gradients(lambda a, w: cross_entropy(Head(a, norm, w, targets, options, overwrite=True), 0.25, 0.1), x, norm, weight)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_tied_weights_add_up():
    _, norm, weight, targets = made()
    ids = torch.randint(0, 53, (31,))
    results = []
    for function in (plain, lambda *a: chunked_cross_entropy(*a[:4], scale=a[4], options=LossOptions(7), overwrite=True)):
        tied = weight.clone().requires_grad_()
        function(F.embedding(ids, tied), norm, tied, targets, 0.5).backward()
        results.append(tied.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "weight", "norm"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, norm, weight, targets = made()
    actual = gradients(lambda a, w: plain(a, norm, w, targets, 1.0), x, norm, weight)
    want = dict(zip(("loss", "x", "weight", "norm", "bias"), actual, strict=True))
    norm.zero_grad()
    leaf, w = x.clone().requires_grad_(frozen != "x"), weight.clone().requires_grad_(frozen != "weight")
    norm.weight.requires_grad_(frozen != "norm")
    (3 * chunked_cross_entropy(leaf, norm, w, targets, scale=1.0, options=LossOptions(7))).backward()
    for name, tensor in {"x": leaf, "weight": w, "norm": norm.weight, "bias": norm.bias}.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_target_is_zero_loss_with_zero_gradients(rows):
    x, weight, norm = torch.randn(rows, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True), Norm(5, torch.float32)
    loss = chunked_cross_entropy(x, norm, weight, torch.full((rows,), -100), scale=1.0, options=LossOptions(2))
    loss.backward()
    assert loss.item() == 0
    assert all(t.grad.abs().sum() == 0 for t in (x, weight, norm.weight, norm.bias))


def test_bfloat16_sums_parameter_gradients_in_float32():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(4096, 8).bfloat16(), (torch.randn(16, 8) / 3).bfloat16(), torch.randint(0, 16, (4096,))
    norm, w = Norm(8, torch.bfloat16), weight.clone().requires_grad_()
    chunked_cross_entropy(x, norm, w, targets, scale=1 / 4096, options=LossOptions(16)).backward()
    exact, exact_norm = weight.double().requires_grad_(), Norm(8)
    exact_norm.load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    plain(x.double(), exact_norm, exact, targets, 1 / 4096).backward()
    # 256 chunks added up in bfloat16 would be off by percents.
    for got, want in ((w, exact), (norm.weight, exact_norm.weight), (norm.bias, exact_norm.bias)):
        assert got.grad.dtype == torch.bfloat16
        assert (got.grad.double() - want.grad).abs().max() < 1e-2 * want.grad.abs().max()


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_whole_length_there_is_only_the_gradient_of_x(overwrite):
    """Peak over two lengths: x's gradient (none of its own with `overwrite`), row numbers and a mask; nothing else grows."""
    width, vocabulary, chunk, peaks = 32, 500, 64, []
    lengths = 1024, 2048
    for rows in lengths:
        x, norm, weight, targets = made(rows, width, vocabulary, torch.bfloat16)
        targets.fill_(1)
        source, weight = x.requires_grad_(), weight.requires_grad_()
        x = source * 1.0
        parameters = [weight, *norm.parameters()]
        for _ in range(2):  # the first step also sees what libraries set up once
            with StorageTracer([x, source, targets, *parameters]) as tracer:
                before = tracer.live_bytes
                loss = chunked_cross_entropy(x, norm, weight, targets, scale=1.0, options=LossOptions(chunk), overwrite=overwrite)
                peaks_now = tracer.peak_bytes - before
                del loss
        peaks.append(peaks_now)
    slope = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    gradient, row_numbers, mask = (0 if overwrite else 2 * width), 16, 2
    assert slope <= gradient + row_numbers + mask
    constant = peaks[0] - slope * lengths[0]
    head_gradient, norm_gradients = 4 * vocabulary * width, 2 * 4 * width
    chunk_bytes = chunk * (10 * vocabulary + 24 * width + 64)  # bfloat16 logits, float32 logits and one copy of them
    assert constant <= head_gradient + 2 * vocabulary * width + 2 * norm_gradients + chunk_bytes


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

    x, weight, norm = torch.randn(600, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True), Norm(4, torch.float32)
    with Largest() as largest:
        targets = torch.zeros(600, dtype=torch.long)
        chunked_cross_entropy(x, norm, weight, targets, scale=1.0, options=LossOptions(10)).backward()
    assert largest.numel == max(10 * 500, 600 * 4)


def test_rows_whose_loss_is_not_finite_are_marked():
    x, norm, weight, targets = made()
    targets[:] = 3
    targets[11] = -100
    for row, value in ((9, float("nan")), (11, float("nan")), (30, float("inf"))):
        x[row, 0] = value
    flags = torch.zeros(31, dtype=torch.bool)
    loss = chunked_cross_entropy(x, norm, weight, targets, scale=1.0, options=LossOptions(4), not_finite=flags)
    assert not loss.isfinite()
    assert flags.nonzero().squeeze(1).tolist() == [9, 30]


def test_chunks_call_the_norm_without_its_hooks():
    """An engine that gathers weights counts a module's calls, and ranks have different numbers of chunks."""
    x, norm, weight, targets = made()
    calls = []
    norm.register_forward_pre_hook(lambda *_: calls.append("before"))
    norm.register_forward_hook(lambda *_: calls.append("after"))
    options = LossOptions(7)
    gradients(lambda a, w: chunked_cross_entropy(a, norm, w, targets, scale=0.25, options=options), x, norm, weight)
    chunked_log_probs(Head(x, norm, weight, targets, options))
    assert not calls
    norm(x)
    assert calls == ["before", "after"]

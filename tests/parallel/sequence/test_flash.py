"""The kernels of CUDA against dense softmax, their libraries replaced by ones of plain torch on the CPU in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from efflaunch.errors import ConfigError
from efflaunch.parallel.sequence import flash, head_parts
from efflaunch.parallel.sequence.attention import AttentionSpec, attention_backward, attention_forward
from efflaunch.parallel.sequence.blocks import Block, Documents, attention_blocks, join_documents, split_keys
from efflaunch.parallel.sequence.flash import CudnnKernel, FlashAttnKernel, FlashKernel, TorchFlashKernel
from efflaunch.parallel.sequence.layout import Slice, zigzag_slices
from efflaunch.tests.parallel.sequence.flash_stubs import Calls, stub_flash_attn, torch_operators_on_cpu
from efflaunch.tests.parallel.test_attention import dense

LENGTHS = (17, 5, 1, 24, 9)
KINDS = {"fa2": FlashAttnKernel, "torch": TorchFlashKernel, "cudnn": CudnnKernel}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls()
    stub_flash_attn(monkeypatch, calls)
    monkeypatch.setattr(flash, "CUDNN_LEAST_ROWS", 2)
    with torch_operators_on_cpu(calls):
        yield calls


def kernel_of(kind: str, **options: bool) -> FlashKernel:
    kernel: FlashKernel = KINDS[kind](dtypes=(torch.float64,), **options)
    return kernel


def check_against_dense(kernel: FlashKernel, spec: AttentionSpec, queries: tuple[Slice, ...], most: int | None = None) -> None:
    """Forward and backward of `queries` against all keys of the documents; `most`: keys a block."""
    torch.manual_seed(1)
    whole = tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS))
    rows = sum(map(len, queries))
    q = torch.randn(rows, spec.num_heads, 8, dtype=torch.float64).requires_grad_()
    k, v = (torch.randn(sum(LENGTHS), spec.num_kv_heads, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    do = torch.randn(q.shape, dtype=torch.float64)
    expected = dense(q, k, v, queries, whole, spec)
    wanted = torch.autograd.grad(expected, [q, k, v], do)
    blocks = attention_blocks(queries, whole, spec.window)
    joined = join_documents(split_keys(blocks, most, spec.window) if most else blocks, most)
    with torch.no_grad():
        o, lse = attention_forward(q, k, v, joined, spec, kernel)
        torch.testing.assert_close(o, expected, rtol=1e-11, atol=1e-12)
        grads: tuple[Tensor, ...] = attention_backward(do, q, k, v, o, lse, joined, spec, kernel)
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_pieces_of_rings_and_cut_keys_are_dense_attention(kind: str, window: int | None, kv_heads: int, calls: Calls) -> None:
    spec, whole = AttentionSpec(4, kv_heads, 8, 0.3, window), tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS))
    check_against_dense(kernel_of(kind), spec, whole)
    assert calls.names == ["documents"] * 2, "whole documents are one call each way"
    for ring, index in ((2, 0), (3, 1)):
        check_against_dense(kernel_of(kind), spec, zigzag_slices(LENGTHS, ring, index))
    check_against_dense(kernel_of(kind), spec, whole, most=7)
    if kind == "cudnn" and window is None:
        assert "cudnn" in calls.names


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_package_is_told_to_add_in_order(deterministic: bool, calls: Calls) -> None:
    """Blocks and joined documents; torch's operators ask torch itself."""
    spec, whole = AttentionSpec(4, 2, 8, 0.3), tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS))
    kernel = FlashAttnKernel(dtypes=(torch.float64,), deterministic=deterministic)
    for queries in (whole, zigzag_slices(LENGTHS, 2, 1)):
        check_against_dense(kernel, spec, queries)
    assert {"block", "documents"} == set(calls.names) and set(calls.in_order) == {deterministic}


def test_softcap_is_the_packages(calls: Calls) -> None:
    for window in (None, 4):
        spec = AttentionSpec(4, 2, 8, 0.3, window, 2.0)
        check_against_dense(kernel_of("fa2"), spec, zigzag_slices(LENGTHS, 2, 1))
        check_against_dense(kernel_of("fa2"), spec, tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS)))
    assert set(calls.names) == {"block", "documents"}


@pytest.mark.parametrize("kind", ["torch", "cudnn"])
def test_a_softcap_is_never_dropped(kind: str, calls: Calls) -> None:
    spec, whole = AttentionSpec(4, 2, 8, 0.3, softcap=2.0), tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS))
    for queries in (whole, zigzag_slices(LENGTHS, 2, 1)):
        with pytest.raises(ConfigError, match="a softcap of 2 in"):
            check_against_dense(kernel_of(kind), spec, queries)
    assert calls.names == []


@pytest.mark.parametrize("kv_heads, most, heads", [(4, 3, [3, 1]), (2, 3, [2, 2]), (2, 1, [1, 1, 1, 1]), (1, 3, [3, 1])])
@pytest.mark.parametrize("kind", ["fa2", "torch"])
def test_heads_are_cut_where_int32_ends(
    kind: str, kv_heads: int, most: int, heads: list[int], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = AttentionSpec(4, kv_heads, 8, 0.3), tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS))
    documents = join_documents(attention_blocks(whole, whole))[0]
    rows = (1 + documents.count) * 128
    monkeypatch.setattr(head_parts, "INT32", rows * 32 * most + 1)
    check_against_dense(kernel_of(kind, int32=True), spec, whole)
    assert calls.heads == heads
    calls.heads.clear()
    check_against_dense(kernel_of(kind), spec, whole)
    assert calls.heads == [4], "the others count further"


def test_cuts_go_to_the_device_once(calls: Calls) -> None:
    whole = tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS))
    spec, documents = AttentionSpec(4, 2, 8, 0.3), join_documents(attention_blocks(whole, whole))[0]
    first, again = (flash.call_of_documents(documents, spec, torch.device("cpu")).cuts for _ in range(2))
    assert first is again and first.tolist() == [0, 17, 22, 23, 47, 56]


def test_other_precisions_go_the_masked_way(calls: Calls) -> None:
    kernel = TorchFlashKernel()
    whole = tuple(Slice(i, 0, n) for i, n in enumerate(LENGTHS))
    check_against_dense(kernel, AttentionSpec(4, 2, 8, 0.3, 4, 2.0), whole)
    check_against_dense(kernel, AttentionSpec(4, 2, 8, 0.3), zigzag_slices(LENGTHS, 2, 0))
    assert calls.names == []


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kind", [TorchFlashKernel, CudnnKernel])
def test_torchs_operators_have_these_shapes_on_cuda(kind: type[FlashKernel], window: int | None) -> None:
    """torch's own description of its CUDA operators, on tensors without memory: schemas, shapes and dtypes of every kind of call."""
    device, spec, kernel = torch.device("cuda", 0), AttentionSpec(8, 2, 128, 0.1, window), kind()
    calls: list[tuple[int, int, Block | Documents]] = [
        (256, 256, Block(0, 256, 0, 256, 0, True, window is not None)),
        (64, 256, Block(0, 64, 0, 256, 256, False, window is not None)),
        (512, 512, Documents(0, 0, (0, 100, 512), window is not None)),
    ]
    for rows, keys, call in calls:
        with FakeTensorMode():
            q = torch.empty((rows, 8, 128), dtype=torch.bfloat16, device=device)
            k, v = (torch.empty((keys, 2, 128), dtype=torch.bfloat16, device=device) for _ in range(2))
            if isinstance(call, Documents):
                call.on_device[device] = torch.empty(call.count + 1, dtype=torch.int32, device=device)
                o, lse = kernel.forward_documents(q, k, v, call, spec)
                grads = kernel.backward_documents(torch.empty_like(o), q, k, v, o, lse, call, spec)
            else:
                o, lse = kernel.forward(q, k, v, call, spec)
                grads = kernel.backward(torch.empty_like(o), q, k, v, o, lse, call, spec)
        assert (o.shape, o.dtype, o.device) == (q.shape, torch.bfloat16, device)
        assert (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)
        assert [(t.shape, t.dtype) for t in grads] == [(t.shape, t.dtype) for t in (q, k, v)]

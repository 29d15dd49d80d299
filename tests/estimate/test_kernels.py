"""What attention kernels allocate for themselves, and when scores are made under a mask, kernel by kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efflaunch.estimate.footprint.kernels import attention_workspace, dq_parts, masked_scores
from efflaunch.estimate.footprint.moment import Widths
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.launcher.config.compose import compose
from efflaunch.tests.memory.settings import GIB

GEMMA2 = (
    "model=llama3_8b", "model.family=gemma2", "model.num_layers=4", "model.sliding_window=4096", "model.tie_embeddings=true",
    "model.max_positions=131072", "model.rope_scaling=null",
)  # fmt: skip


def inputs(kernel: str, *words: str) -> PlanInputs:
    config = compose(
        ["model=llama3_8b", "data=stdlib", "data.max_seq_len=128K", "data.global_batch_tokens=1M", "cluster=h100_80g_8",
         "parallel.tokens_per_rank=128K", "parallel.scheme=ulysses", "memory=recompute", "train.steps=1", "train.dtype=bfloat16",
         f"parallel.attention_kernel={kernel}", *words]
    )  # fmt: skip
    return PlanInputs.of(config)


@pytest.mark.parametrize(("kernel", "per_row"), [("fa2", 32), ("sdpa", 32), ("fa3", 24), ("fa4", 24), ("cudnn", 32.125)])
def test_workspace_of_a_row_of_llama_8b(kernel: str, per_row: float) -> None:
    """KiB: queries' gradient 4 x 4096; keys' and values' for 32 heads 4 x 4096, or in float32 for 8 heads 8 x 1024; 4 x 32 of sums."""
    made = inputs(kernel)
    assert attention_workspace(made, Widths.of(made)) == per_row * 1024
    assert attention_workspace(made, Widths.of(made), 4) - attention_workspace(made, Widths.of(made)) == 3 * (per_row // 8 * 8 - 16) * 1024
    assert attention_workspace(replace(made, cluster=compose(["+experiment=quickstart"]).cluster), Widths.of(made)) == 0.0


@pytest.mark.parametrize(
    ("kernel", "words", "parts"),
    [
        ("fa2", (), 33),
        ("sdpa", ("cluster.gpu=b200",), 37),
        ("fa2", ("parallel.sp_degree=1", "data.max_seq_len=64K"), 5),
        ("fa3", (), 1),
        ("fa4", (), 1),
        ("fa2", ("train.dtype=float32",), 1),
    ],
)
def test_parts_of_queries_gradient_in_order(kernel: str, words: tuple[str, ...], parts: int) -> None:
    """FlashAttention 2 has one for each of 132 (148) multiprocessors over the 4 (32) heads of a rank; each is 16 KiB of a row."""
    eight = ("parallel.sp_degree=8", "parallel.tokens_per_rank=128K", "data.max_seq_len=1M", "data.global_batch_tokens=8M")
    fast = ("cluster.attention_efficiency=0.3", f"parallel.attention_kernel={kernel}")
    free, ordered = (inputs(kernel, *eight, *fast, *words, f"train.deterministic={asked}") for asked in ("false", "true"))
    w = Widths.of(ordered)
    assert (dq_parts(free, w), dq_parts(ordered, w)) == (1, parts)
    assert attention_workspace(ordered, w) - attention_workspace(free, w) == (parts - 1) * 16 * 1024
    half = Widths.of(ordered, 2)
    assert dq_parts(ordered, half) == (1 if parts == 1 else -(-(148 if "cluster.gpu=b200" in words else 132) // (16 if parts == 5 else 2)))


def test_a_kernel_with_less_workspace_has_a_smaller_peak() -> None:
    """One piece of all rows: in backward of attention the kernels differ by 8 KiB a row, over the rows of a rank."""
    from efflaunch.estimate.ledger import device_account

    old, new = (device_account(inputs(kernel)).phase_bytes(Phase.BACKWARD_ATTENTION) for kernel in ("fa2", "fa3"))
    assert old - new == 8 * 1024 * (128 << 10)


@pytest.mark.parametrize(
    ("kernel", "words", "masked"),
    [
        ("cudnn", (), False),
        ("sdpa", GEMMA2, False),
        ("fa2", GEMMA2, False),
        ("fa3", GEMMA2, False),
        ("fa2", (*GEMMA2, "memory=streambp"), False),
        ("fa2", (*GEMMA2, "train.dtype=float32"), True),
        ("fa2", ("model=mistral_7b", "model.sliding_window=4096"), False),
        ("fa2", ("model=mistral_7b", "model.sliding_window=4096", "memory=streambp"), False),
        ("fa2", ("model=mistral_7b", "model.sliding_window=4096", "parallel.scheme=ring", "parallel.sp_degree=4"), False),
        ("fa3", ("train.dtype=float32",), True),
    ],
)
def test_scores_under_a_mask(kernel: str, words: tuple[str, ...], masked: bool) -> None:
    """A precision that no kernel has. Windows' edges, also through pieces and rings, are kernels' own, and softcaps flash-attn's."""
    term: Any = masked_scores(inputs(kernel, *words))
    assert (term.num_bytes > 0) == masked


def test_a_softcap_at_128k_keys_is_counted() -> None:
    """512 queries x 128K keys of 32 heads in float32 are 8 GiB; some of them are there several times."""
    assert masked_scores(inputs("auto", *GEMMA2, "train.dtype=float32")).num_bytes > 4 * 8 * GIB

"""The parity table of pipelines: stages on ranks of their own, against a plain single-process Hugging Face model, float64 at 1e-10."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.tests.parity.ranks_side import run_plans
from efflaunch.tests.parity.test_parity import ALL, LENGTHS, batch, check_parity, make_documents, plan_of, reference, rms, static
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


GPIPE, INTERLEAVED, ZERO = PipelineOrder.GPIPE, PipelineOrder.INTERLEAVED, PipelineOrder.ZERO_BUBBLE
EACH = plan_of(1, *(batch((0, 1, 1, (index,))) for index in ALL))
"""One rank a stage, a micro-batch for each document: unequal, down to five tokens."""
GROUPS = plan_of(
    2,
    batch((0, 2, 2, (2,))),
    batch((0, 2, 1, (0,))),
    batch((0, 1, 1, (3,)), (1, 1, 1, (4,))),
    batch((1, 1, 1, (1,))),
)
"""Two ranks a stage: Ulysses, ring, two groups side by side, and a micro-batch of which the first rank has nothing."""
ROWS = {
    "2 stages": ({"stages": 2}, EACH),
    "2 stages, one micro-batch": ({"stages": 2}, static(1, 1, 1)),
    "4 stages, three steps": ({"stages": 4, "family": "llama_deep", "steps": 3}, EACH),
    "4 stages, fewer micro-batches than stages": (
        {"stages": 4, "family": "llama_deep"}, plan_of(1, batch((0, 1, 1, ALL[:2])), batch((0, 1, 1, ALL[2:]))),
    ),
    "2 stages, GPipe": ({"stages": 2, "order": GPIPE, "gpipe": 5}, EACH),
    "4 stages, GPipe, two at a time": ({"stages": 4, "order": GPIPE, "gpipe": 2, "family": "llama_deep"}, EACH),
    "2 stages, interleaved by 2": ({"stages": 2, "order": INTERLEAVED, "virtual": 2, "family": "llama_deep"}, GROUPS),
    "2 stages, interleaved by 2, three steps": (
        {"stages": 2, "order": INTERLEAVED, "virtual": 2, "family": "llama_deep", "steps": 3, "policy": "segments_2"}, EACH,
    ),
    "2 stages, interleaved unevenly, reduced each time": (
        {"stages": 2, "order": INTERLEAVED, "virtual": 2, "family": "llama_deep", "layers": (2, 1, 1, 1), "reduce_each": True}, GROUPS,
    ),
    "2 stages, interleaved by 2, tied, uneven, recompute": (
        {"stages": 2, "order": INTERLEAVED, "virtual": 2, "family": "llama_tied_deep", "layers": (1, 2, 1, 1), "policy": "recompute"},
        GROUPS,
    ),
    "2 stages, some layers of experts, interleaved, balanced": (
        {"stages": 2, "order": INTERLEAVED, "virtual": 2, "family": "qwen3_moe_mixed", "router": (0.3, 0.05)}, GROUPS,
    ),
    "2 stages, one of them without experts, balanced, EP 2": (
        {"stages": 2, "family": "qwen3_moe_mixed", "router": (0.3, 0.05), "layers": (1, 4), "ep": 2, "policy": "recompute"}, GROUPS,
    ),
    "2 stages, experts that drop rows": ({"stages": 2, "family": "qwen3_moe", "capacity": 1.0, "policy": "segments_2"}, EACH),
    "2 stages, sigmoid routers, shared experts": ({"stages": 2, "family": "dots1", "policy": "streambp"}, GROUPS),
    "2 uneven stages": ({"stages": 2, "family": "llama_deep", "layers": (4, 1)}, EACH),
    "2 stages, sequence groups, three steps": ({"stages": 2, "steps": 3}, GROUPS),
    "2 stages, sequence groups, HSDP": ({"stages": 2, "replicate": 2}, GROUPS),
    "2 stages, sequence groups, reduced each time": ({"stages": 2, "reduce_each": True, "steps": 3}, GROUPS),
    "2 stages, sequence groups, GPipe, reduced each time": ({"stages": 2, "order": GPIPE, "gpipe": 3, "reduce_each": True}, GROUPS),
    "2 stages, tied embeddings, three steps": ({"stages": 2, "family": "llama_mha_tied", "steps": 3}, GROUPS),
    "4 stages, tied embeddings": ({"stages": 4, "family": "llama_tied_deep"}, EACH),
    "2 stages, loss mask": ({"stages": 2, "masked": True}, GROUPS),
    "2 stages, float32": ({"stages": 2, "dtype": "float32"}, GROUPS),
    **{
        f"2 stages, {policy}, {family}": ({"stages": 2, "policy": policy, "family": family}, GROUPS)
        for policy, family in (
            ("recompute", "llama_deep"), ("streambp", "qwen3"), ("segments_2", "llama_deep"), ("shares_streamed", "llama_deep"),
            ("upipe_stored", "mistral"), ("memo_0.3", "gemma3"), ("segments_3_host", "llama_deep"), ("everything kept by class", "qwen2"),
        )
    },
    "2 stages, host store": ({"stages": 2, "policy": "shares_streamed", "family": "llama_deep", "store": "arena"}, GROUPS),
    "2 stages, compiled": ({"stages": 2, "policy": "recompute", "compile": "aot_eager"}, GROUPS),
    "2 stages, mixture of experts, EP 2": ({"stages": 2, "family": "qwen3_moe", "ep": 2, "policy": "recompute"}, GROUPS),
    "2 stages, mixture of experts, balanced": ({"stages": 2, "family": "qwen3_moe", "router": (0.3, 0.05)}, GROUPS),
    "2 stages, gpt_oss, GPipe": ({"stages": 2, "family": "gpt_oss", "order": GPIPE, "gpipe": 4, "policy": "segments_2"}, GROUPS),
    "2 stages, first stage frozen": ({"stages": 2, "family": "llama_deep", "frozen": ("embed_tokens", "layers.0.", "layers.1.")}, GROUPS),
    "4 stages, zero bubble, tied, three steps": (
        {"stages": 4, "order": ZERO, "family": "llama_tied_deep", "steps": 3, "policy": "recompute"}, EACH,
    ),
    "2 stages, zero bubble, reduced each time": (
        {"stages": 2, "order": ZERO, "reduce_each": True, "policy": "streambp", "steps": 2}, GROUPS,
    ),
    "2 stages, zero bubble, HSDP": ({"stages": 2, "order": ZERO, "replicate": 2, "policy": "shares_streamed"}, GROUPS),
    "2 stages, zero bubble, experts, EP 2": (
        {"stages": 2, "order": ZERO, "family": "qwen3_moe_mixed", "router": (0.3, 0.05), "ep": 2, "reduce_each": True}, GROUPS,
    ),
    "2 stages, zero bubble, first stage frozen": (
        {"stages": 2, "order": ZERO, "family": "llama_deep", "frozen": ("embed_tokens", "layers.0.", "layers.1.")}, GROUPS,
    ),
    "2 stages, zero bubble, compiled": ({"stages": 2, "order": ZERO, "policy": "recompute", "compile": "aot_eager"}, GROUPS),
    "2 stages, zero bubble, host store": (
        {"stages": 2, "order": ZERO, "policy": "shares_streamed", "family": "qwen2", "store": "arena"}, GROUPS,
    ),
    **{
        f"2 stages, zero bubble, {policy}, {family}": ({"stages": 2, "order": ZERO, "policy": policy, "family": family}, GROUPS)
        for policy, family in (
            ("keep", "llama_mha_tied"), ("upipe_stored", "qwen3"), ("chunks_5", "gemma2"), ("segments_3_host", "olmo2"),
            ("everything kept by class", "phi3"), ("streambp_1", "gpt_oss"), ("memo_0.3", "dots1"), ("recompute", "qwen2_moe"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_gradients_equal_plain_hugging_face(pool: RankPool, row: str) -> None:
    case, plan = ROWS[row]
    check_parity(pool, case, [plan])


def test_zero_bubble_in_bfloat16_is_as_close_to_the_truth_as_1f1b(pool: RankPool) -> None:
    """Weight gradients of five unequal micro-batches that wait for passes of their own add up in float32 as those made at once do."""
    documents, targets = make_documents(LENGTHS)
    weights, loss, exact, _ = reference("llama", "float64", LENGTHS, False, 0.0, 0)
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    errors = []
    for order in (PipelineOrder.ONE_F_ONE_B, ZERO):
        case = {"family": "llama", "dtype": "bfloat16", "policy": "recompute", "stages": 2, "order": order}
        ((got_loss, ours),) = pool.run(run_plans, case, weights, documents, targets, [EACH], 0, ranks=2)[0][0]
        assert abs(got_loss - loss) < 1e-2 * loss
        assert all(gradient.dtype == np.float32 for gradient in ours.values())
        errors.append(rms(ours, exact))
    plain, zero_bubble = errors
    assert zero_bubble <= 1.1 * plain

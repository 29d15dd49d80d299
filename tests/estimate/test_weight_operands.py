"""What waits for gradients of weights in a pass of their own: the executor's own count, on as many micro-batches as there are stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.footprint.weight_operands import makes_weights_apart, operand_row, weight_operands
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.policy import KEEP_ALL, MemoryPolicy
from efflaunch.model.config import Family
from efflaunch.parallel.pipeline.config import PipelineConfig, PipelineOrder
from efflaunch.tests.memory.settings import LLAMA_8B, make_ledger
from efflaunch.tests.memory.test_weight_products import operands_a_token
from efflaunch.tests.parity.reference import BASE

SMALL = LLAMA_8B | {
    "family": Family.QWEN2,
    "num_layers": 8,
    "hidden_size": BASE["hidden_size"],
    "intermediate_size": BASE["intermediate_size"],
    "num_heads": BASE["num_attention_heads"],
    "num_kv_heads": BASE["num_key_value_heads"],
}


@pytest.fixture(scope="module")
def whole() -> PlanInputs:
    inputs = make_ledger(SMALL, length=1 << 14, tokens_per_rank=1 << 14).asked
    pipeline = PipelineConfig(stages=4, order=PipelineOrder.ZERO_BUBBLE)
    return replace(inputs, parallel=replace(inputs.parallel, pipeline=pipeline), layout=replace(inputs.layout, stages=4))


@pytest.mark.parametrize(
    ("policy", "visits"),
    [
        (KEEP_ALL, 1),
        (MemoryPolicy(), 1),
        (MemoryPolicy(head_groups=2), 2),
        # Queries, then keys and values, where a group has several ranks: none is counted less.
        (MemoryPolicy(attention=AttentionTiling.CHUNKS, chunk_tokens=1024), 2),
    ],
    ids=["keep", "recompute", "head groups", "streamed"],
)
def test_a_token_takes_what_the_executor_leaves(whole: PlanInputs, policy: MemoryPolicy, visits: int) -> None:
    inputs = replace(whole, policy=policy)
    assert operand_row(inputs) == inputs.width * operands_a_token(visits)


def test_later_ranks_put_off_more(whole: PlanInputs) -> None:
    """Rank 1 of 4 has three micro-batches in flight and one whose gradients of weights wait; the live one's come layer by layer."""
    stage = whole.stage(range(2, 4), in_flight=3)
    layer = operand_row(stage) * stage.tokens
    waits = {number: weight_operands(stage, number).by_phase for number in (0, 1)}
    assert waits[1][Phase.FORWARD] == waits[1][Phase.LOSS] == 2 * layer
    assert waits[1][Phase.BACKWARD_MLP] == 3 * layer and waits[0][Phase.LAYER_REDUCE] == waits[0][Phase.REDUCE] == 4 * layer
    assert Phase.OPTIMIZER not in waits[0]


@pytest.mark.parametrize("pipeline", [PipelineConfig(), PipelineConfig(stages=4)])
def test_other_orders_put_nothing_off(whole: PlanInputs, pipeline: PipelineConfig) -> None:
    inputs = replace(whole, parallel=replace(whole.parallel, pipeline=pipeline), layout=replace(whole.layout, stages=pipeline.stages))
    assert not makes_weights_apart(inputs) and weight_operands(inputs, 0).num_bytes == 0

"""What units cost, from layers and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.work import Batch, LayerLoad, ModelLoad, Recompute, unit_costs

LAYER = LayerLoad(token_s=2.0, pair_s=0.5, kept_bytes=10.0, attention_bytes=1.5, input_bytes=1.0, fixed_bytes=100.0)
MODEL = ModelLoad(
    layers=(LAYER,) * 5, embedding=LayerLoad(fixed_bytes=7.0), head=LayerLoad(token_s=1.0, kept_bytes=3.0, input_bytes=1.0, fixed_bytes=9.0)
)
NONE = (Recompute.NONE,) * 2


def test_units_take_their_tokens_and_pairs() -> None:
    batch = Batch(((4,), (2, 1)))
    table = unit_costs(MODEL, batch, (2, 3), batch.sizes(MODEL, 1), NONE, alpha_s=0.25, s_per_byte=0.5)
    # 10 pairs of 4 tokens; 3 + 1 pairs of 2 + 1 tokens.
    assert table.forward_s[:, :, 0].tolist() == [[2 * (8 + 5), 2 * (6 + 2)], [3 * (8 + 5) + 4, 3 * (6 + 2) + 3]]
    assert table.weight_s[:, :, 0].tolist() == [[16, 12], [28, 21]]
    assert table.backward_s[:, :, 0].tolist() == [[2 * (8 + 12.5), 2 * (6 + 5)], [3 * (8 + 12.5) + 4, 3 * (6 + 5) + 3]]
    assert table.output_bytes[:, :, 0].tolist() == [[4, 3], [0, 0]]
    assert table.fixed_bytes.tolist() == [207, 309] and (table.alpha_s, table.s_per_byte) == (0.25, 0.5)
    assert table.held_bytes[:, :, 0].tolist() == [[80, 60], [132, 99]] and not table.work_bytes.any()


def test_recomputation_runs_forward_again_and_holds_inputs() -> None:
    batch = Batch.equal(1, 4)
    kept, linear, layer, stage = (unit_costs(MODEL, batch, (2, 3), batch.sizes(MODEL, 1), (way,) * 2) for way in Recompute)
    for table in (layer, stage):
        assert np.array_equal(table.backward_s, kept.backward_s + kept.forward_s)
        assert np.array_equal(table.forward_s, kept.forward_s) and np.array_equal(table.weight_bytes, kept.held_bytes)
    # Attention is not run again: 2 a token, not 0.5 a pair.
    assert (linear.backward_s - kept.backward_s).ravel().tolist() == [2 * 2 * 4, 3 * 2 * 4 + 4]
    assert linear.held_bytes.ravel().tolist() == [2 * 2.5 * 4, 3 * 2.5 * 4 + 4] and linear.work_bytes.ravel().tolist() == [40, 40]
    assert layer.held_bytes.ravel().tolist() == [8, 16] and layer.work_bytes.ravel().tolist() == [40, 40]
    assert stage.held_bytes.ravel().tolist() == [4, 4] and stage.work_bytes.ravel().tolist() == [80, 132]


def test_slices_are_even_in_the_model_s_work() -> None:
    batch = Batch.equal(2, 4096)
    sizes = batch.sizes(MODEL, 4)
    table = unit_costs(MODEL, batch, (2, 3), sizes, NONE)
    assert table.shape == (2, 2, 4) and all(sum(row) == 4096 and row[0] > row[3] for row in sizes)
    forward = table.forward_s.sum(axis=0)[0]
    assert max(forward) / min(forward) < 1.01
    whole = unit_costs(MODEL, batch, (2, 3), batch.sizes(MODEL, 1), NONE)
    assert table.forward_s.sum(axis=2) == pytest.approx(whole.forward_s[:, :, 0])


@pytest.mark.parametrize("counts", [(5, 0), (2, 2), (), (6, -1)])
def test_a_partition_of_another_model_is_refused(counts: tuple[int, ...]) -> None:
    batch = Batch.equal(1, 4)
    with pytest.raises(PlanError, match="5 together"):
        unit_costs(MODEL, batch, counts, batch.sizes(MODEL, 1), NONE)


def test_stages_may_recompute_in_different_ways() -> None:
    batch = Batch.equal(1, 4)
    table, kept, again = (
        unit_costs(MODEL, batch, (2, 3), batch.sizes(MODEL, 1), ways)
        for ways in ((Recompute.LAYER, Recompute.NONE), NONE, (Recompute.LAYER,) * 2)
    )
    for name in ("backward_s", "held_bytes", "work_bytes"):
        assert getattr(table, name)[0] == getattr(again, name)[0] and getattr(table, name)[1] == getattr(kept, name)[1]

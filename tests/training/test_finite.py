"""What is said of a loss that is not a finite number."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from efflaunch.parallel.sequence.layout import Slice
from efflaunch.parallel.sequence.plan import Group
from efflaunch.tests.ranks import RankPool
from efflaunch.training.data.shard import PackedShard, Part
from efflaunch.training.non_finite import RowWatch, non_finite


def shard(*slices, parts=()):
    rows = np.zeros(sum(len(piece) for piece in slices), dtype=np.int64)
    return PackedShard(rows, rows, rows, slices, parts)


class Source:
    def describe(self, step, index, start=0, stop=None):
        return f"sequence {index} tokens {start}-{stop}"


def test_spans_are_in_tokens_of_their_sequence():
    watch, held = RowWatch(torch.device("cpu")), shard(Slice(2, 5, 8), Slice(0, 0, 4), Slice(2, 10, 12))
    watch.flags(1, 9)[torch.tensor([1, 2, 8])] = True
    assert watch.spans(1, held) == [(2, 6, 8), (2, 11, 12)]
    assert watch.spans(0, held) == []


def _report(losses, marked):
    """Rank r holds tokens [10 r, 10 r + 10) of sequence 3 and of the second document of sequence 4; what the error says."""
    rank = dist.get_rank()
    parts = Part(3, 0, 0, 20), Part(4, 1, 100, 20)
    held = shard(Slice(0, 10 * rank, 10 * rank + 10), Slice(1, 10 * rank, 10 * rank + 10), parts=parts)
    works = [SimpleNamespace(shard=held, group=Group(0, 2, 2, (3, 4))), SimpleNamespace(shard=shard(), group=None)]
    watch = RowWatch(torch.device("cpu"))
    watch.flags(0, 20)[torch.tensor(marked[rank], dtype=torch.int64)] = True
    return non_finite(float("nan"), torch.tensor([losses[rank], 0.0]), works, watch, Source(), 6).found


def test_tokens_of_all_ranks_are_named_once_per_sequence():
    nan = float("nan")
    with RankPool() as pool:
        both = pool.run(_report, (nan, nan), ([12, 13], [10, 15]), ranks=2)
        assert both[0] == both[1] == "a loss or gradient norm of nan (ranks 0, 1; sequence 4 tokens 102-116)"
        one = pool.run(_report, (1.0, nan), ([], [0, 19]), ranks=2)
        assert one[0] == "a loss or gradient norm of nan (ranks 1; sequence 3 tokens 10-11; sequence 4 tokens 119-120)"
        overflow = pool.run(_report, (float("inf"), 1.0), ([], []), ranks=2)
        assert overflow[0] == "a loss or gradient norm of nan (ranks 0; sequence 3 tokens 0-None; sequence 4 tokens 0-None)"
        gradients = pool.run(_report, (1.0, 1.0), ([], []), ranks=2)
        assert gradients[0].endswith("(ranks none: every loss is finite, the gradients are not; no single document)")


def _half_applied():
    error = non_finite(
        float("nan"), torch.zeros(0), [], RowWatch(torch.device("cpu")), Source(), 6, layer="model.layers.3", partly_applied=True
    )
    return str(error)


def test_a_layer_that_was_not_updated_is_named_and_that_others_were():
    with RankPool() as pool:
        text = pool.run(_half_applied, ranks=1)[0]
    assert "step 7: found a loss or gradient norm of nan" in text and "first in the gradients of model.layers.3" in text
    assert "model.layers.3 was not updated, but modules before it in backward were (optim.update=backward)" in text
    assert "the last checkpoint is intact" in text

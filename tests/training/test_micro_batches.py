"""One rank's work in each micro-batch of a step."""

from __future__ import annotations

import numpy as np
import torch

from efflaunch.model.chunked_loss import IGNORE
from efflaunch.tests.parity.ranks_side import ListSource
from efflaunch.tests.parity.test_parity import batch, make_documents, plan_of
from efflaunch.training.micro_batches import EMPTY, read_step, step_shape, to_tokens

LENGTHS = (37, 5, 64)
PLAN = plan_of(2, batch((0, 2, 1, (2,))), batch((1, 1, 1, (0, 1))), lengths=LENGTHS)
SOURCE = ListSource(*make_documents(LENGTHS))


def test_a_rank_reads_what_it_holds_and_nothing_where_it_has_no_group() -> None:
    first, second = (read_step(SOURCE, 0, PLAN, rank) for rank in range(2))  # type: ignore[arg-type]
    assert [work.shard.num_tokens for work in first] == [32, 0] and first[1].group is None
    assert [work.shard.num_tokens for work in second] == [32, 42]
    assert sorted(np.concatenate([first[0].shard.token_ids, second[0].shard.token_ids])) == sorted(SOURCE.documents[2])


def test_ranks_that_share_experts_know_how_many_tokens_the_others_have() -> None:
    (one, two) = read_step(SOURCE, 0, PLAN, 0, shares_experts=True)  # type: ignore[arg-type]
    assert one.rank_tokens == (32, 32) and two.rank_tokens == (0, 42)


def test_rows_carry_the_length_of_their_whole_document() -> None:
    tokens = to_tokens(read_step(SOURCE, 0, PLAN, 1)[1], torch.device("cpu"))  # type: ignore[arg-type]
    assert tokens.document_lengths.tolist() == [37] * 37 + [5] * 5
    assert tokens.position_ids.tolist() == [*range(37), *range(5)] and int((tokens.target_ids == IGNORE).sum()) == 2
    assert to_tokens(EMPTY, torch.device("cpu")).token_ids.shape == (0,)


def test_steps_of_other_sizes_have_other_shapes() -> None:
    mine, others = (step_shape(read_step(SOURCE, 0, PLAN, rank)) for rank in range(2))  # type: ignore[arg-type]
    assert mine == step_shape(read_step(SOURCE, 0, PLAN, 0)) != others  # type: ignore[arg-type]

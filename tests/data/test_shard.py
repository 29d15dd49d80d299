"""Shards: over all ranks of any plan, each token, target and position of the batch exactly once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan
from efflaunch.training.data.shard import build_shard
from efflaunch.training.data.source import DataSource

from ..parallel.sequence.random_plans import step_plans
from .corpora import open_source, write_corpus


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Documents with token ids that tell document and position apart, the split length and the batch size."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda drawn: max(drawn) > 1))
    max_seq_len = draw(st.integers(2, 24))
    documents = [[index * 32 + position for position in range(length)] for index, length in enumerate(lengths)]
    return documents, max_seq_len, draw(st.integers(max_seq_len, 80))


def _gather(source: DataSource, step: int, plan: StepPlan) -> list[list[tuple[int, int, int]]]:
    """Per sequence of the step: (position, token, target) of every resident token, sorted."""
    held: list[list[tuple[int, int, int]]] = [[] for _ in plan.lengths]
    for index, micro_batch in enumerate(plan.micro_batches):
        for rank in range(plan.world_size):
            shard, layout = build_shard(source, step, plan, index, rank)
            group = micro_batch.group_of(rank)
            assert (group is None) == (layout is None)
            if group is None or layout is None:
                assert shard.num_tokens == 0 and shard.slices == ()
                continue
            assert layout.member_slices[rank - group.first_rank] == shard.slices
            owners = [group.sequences[piece.sequence] for piece in shard.slices for _ in range(len(piece))]
            assert shard.by_row(lambda part: part.sequence).tolist() == owners
            columns = (shard.position_ids, shard.token_ids, shard.target_ids)
            for owner, *row in zip(owners, *(column.tolist() for column in columns), strict=True):
                held[owner].append(tuple(row))
    return [sorted(rows) for rows in held]


@settings(max_examples=60, deadline=None)
@given(st.data(), batches())
def test_shards_of_any_plan_cover_the_batch_once(data: st.DataObject, batch: tuple[list[list[int]], int, int]) -> None:
    documents, max_seq_len, batch_tokens = batch
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(write_corpus(Path(folder) / "c", documents), max_seq_len=max_seq_len, batch=batch_tokens)
        step = data.draw(st.integers(0, 5))
        plan = data.draw(step_plans(source.lengths(step), world_sizes=[1, 2, 4, 8]))
        held = _gather(source, step, plan)
    targets = 0
    for row, rows in zip(source.sampler.step(step), held, strict=True):
        piece = source.table[int(row)]
        document = documents[piece.document]
        expected = [
            (t - piece.start, document[t], document[t + 1] if t + 1 < len(document) else -100) for t in range(piece.start, piece.stop)
        ]
        assert rows == expected
        targets += sum(target != -100 for _, _, target in rows)
    assert source.num_target_tokens(step) == targets


def test_a_shard_reads_only_what_it_holds(tmp_path: Path) -> None:
    source = open_source(write_corpus(tmp_path / "c", [list(range(100))]), max_seq_len=100, batch=100)
    plan = StepPlan(4, (100,), (MicroBatch((Group(0, 4, 1, (0,)),)),))
    read: list[tuple[int, int]] = []
    whole = source.corpora[0].tokens

    def tokens(document: int, start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return whole(document, start, stop)

    source.corpora[0].tokens = tokens  # type: ignore[method-assign]
    shard, _ = build_shard(source, 0, plan, 0, 1)
    assert read == [(12, 26), (75, 88)]  # each slice and one more token, its last target
    assert shard.num_tokens == 25

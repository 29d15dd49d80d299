"""Pieces of rows: cut by chunks and where a class changes its place, as many for every member of a group."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.memory.config import ActivationPlace
from efflaunch.memory.policy import KEPT, MOVED, RECOMPUTED, MemoryPolicy, Split
from efflaunch.memory.ranges import group_ranges, place_of

shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: Split(pair[0], pair[1] * (1 - pair[0])))


@given(st.integers(0, 60), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 70)), shares, shares)
def test_pieces_cover_every_member_in_order(total, members, chunk, query, mlp):
    tokens = tuple(total * (k + 1) // members - total * k // members for k in range(members))
    policy = MemoryPolicy(query=query, mlp=mlp, chunk_tokens=chunk)
    pieces = group_ranges(tokens, policy)
    for member, count in enumerate(tokens):
        rows = [piece[member] for piece in pieces]
        assert [row for start, stop in rows for row in range(start, stop)] == list(range(count))
        assert chunk is None or all(stop - start <= chunk for start, stop in rows)
        for name in ("query", "mlp", "residual"):
            kept, moved = policy.splits[name].rows(count)
            for start, stop in rows:
                place = place_of(policy.splits[name], (start, stop), count)
                wanted = {ActivationPlace.KEEP: (0, kept), ActivationPlace.HOST: (kept, moved), ActivationPlace.RECOMPUTE: (moved, count)}[
                    place
                ]
                assert start == stop or (wanted[0] <= start and stop <= wanted[1])
    assert len(pieces) == 1 or all(any(start < stop for start, stop in piece) for piece in pieces)


@pytest.mark.parametrize("count", [0, 3])
def test_a_rank_without_rows_stores_what_the_others_store(count):
    """Otherwise it would pass over an exchange that they make."""
    assert place_of(RECOMPUTED, (0, 0), count) is ActivationPlace.RECOMPUTE
    assert place_of(Split(host=0.3), (0, 0), count) is ActivationPlace.RECOMPUTE
    assert all(place_of(split, (0, 0), count) is not ActivationPlace.RECOMPUTE for split in (KEPT, MOVED, Split(keep=0.4, host=0.6)))


def test_without_chunks_and_shares_all_rows_are_one_piece():
    assert group_ranges((10,), MemoryPolicy()) == (((0, 10),),)
    assert group_ranges((0,), MemoryPolicy(chunk_tokens=4)) == (((0, 0),),)
    assert group_ranges((5, 4), MemoryPolicy(chunk_tokens=4)) == (((0, 4), (0, 4)), ((4, 5), (4, 4)))


def test_shares_that_are_almost_whole_leave_nothing_to_be_recomputed():
    assert Split(keep=0.3, host=0.7 - 1e-9).rows(1 << 20) == (round(0.3 * (1 << 20)), 1 << 20)
    assert KEPT.rows(7) == (7, 7) and MOVED.rows(7) == (0, 7) and Split().rows(7) == (0, 0)
    with pytest.raises(ValueError, match="between 0 and 1 together"):
        Split(keep=0.7, host=0.5)

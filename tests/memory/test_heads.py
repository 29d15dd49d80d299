"""Head groups: every query head once, evenly over ranks, with the key/value heads it reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from efflaunch.memory.heads import ALL_HEADS, head_groups, num_head_groups


@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 8), st.sampled_from([1, 2, 4, 8]), st.integers(1, 9))
def test_groups_cover_all_heads_evenly(share, num_kv_heads, ulysses, most):
    num_heads = share * num_kv_heads
    if num_heads % ulysses:
        return
    groups = head_groups(num_heads, num_kv_heads, most=most, ulysses=ulysses)
    assert len(groups) == num_head_groups(num_heads, num_kv_heads, most=most, ulysses=ulysses) <= most
    if len(groups) == 1:
        assert groups == (ALL_HEADS,)
        return
    run = num_heads // ulysses
    assert sorted(head for group in groups for head in group.queries) == list(range(num_heads))
    for group in groups:
        owners = [head // run for head in group.queries]
        assert owners == sorted(owners) and all(owners.count(rank) == len(owners) // ulysses for rank in range(ulysses))
        # The i-th query head of the group reads the key/value head that even sharing gives it.
        even = len(group.queries) // len(group.keys)
        assert [group.keys[index // even] for index in range(len(group.queries))] == [head // share for head in group.queries]


def test_groups_whose_ranks_share_heads_unevenly_are_not_taken():
    """Twelve heads over four ranks, three key/value heads: single heads of every rank would be 0, 3, 6, 9, and two of them read head 0."""
    assert head_groups(12, 3, most=3, ulysses=4) == (ALL_HEADS,)
    assert num_head_groups(24, 3, most=6, ulysses=4) == 1
    assert num_head_groups(40, 5, most=5, ulysses=8) == 1


def test_the_largest_number_that_divides_is_taken():
    assert num_head_groups(32, 8, most=4, ulysses=1) == 4
    assert num_head_groups(32, 8, most=8, ulysses=8) == 4
    assert num_head_groups(12, 3, most=5, ulysses=1) == 3
    assert num_head_groups(6, 3, most=2, ulysses=1) == 1  # three heads would be one run and a half

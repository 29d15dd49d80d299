"""Cuts of heads: every head once, what each call counts within int32."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.parallel.sequence.head_parts import head_parts, heads_of_call


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 40))
def test_every_head_is_in_one_part_with_its_keys(kv_heads: int, share: int, most: int) -> None:
    heads = kv_heads * share
    read = []
    for queries, keys in head_parts(heads, kv_heads, most):
        run, own = range(heads)[queries], range(kv_heads)[keys]
        assert 0 < len(run) <= most and len(run) % len(own) == 0
        read += [(head, own[i // (len(run) // len(own))]) for i, head in enumerate(run)]
    assert read == [(head, head // share) for head in range(heads)]


def test_how_many_heads_int32_counts() -> None:
    assert heads_of_call(4 << 20, 1, 128) == 3, "4M rows: four heads are 2^31 numbers"
    assert heads_of_call(1 << 20, 1, 128) == 15
    assert heads_of_call(1024, 1024, 128) == 127, "documents are padded to 128 rows each"
    assert heads_of_call(1 << 20, 1, 80) == 21 and heads_of_call(1 << 20, 1, 200) == 7
    with pytest.raises(ValueError, match="flash-attn 2.8"):
        heads_of_call(17 << 20, 1, 128)

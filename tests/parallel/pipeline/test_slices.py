"""Cuts of a micro-batch, against every other way to cut it."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.pipeline.slices import balanced_slices, slice_work


def best_of_all(documents: list[int], slices: int, token_work: float, pair_work: float) -> float:
    tokens = sum(documents)
    return min(
        max(slice_work(documents, [b - a for a, b in zip((0, *cuts), (*cuts, tokens), strict=True)], token_work, pair_work))
        for cuts in combinations(range(1, tokens), slices - 1)
    )


def test_no_other_cut_has_a_faster_slowest_slice() -> None:
    rng = random.Random(3)
    for _ in range(60):
        documents = [rng.randint(1, 7) for _ in range(rng.randint(1, 3))]
        slices, work = rng.randint(1, min(4, sum(documents))), (rng.choice((0.0, 1.0, 10.0)), rng.choice((0.5, 1.0)))
        sizes = balanced_slices(documents, slices, token_work=work[0], pair_work=work[1])
        assert sum(sizes) == sum(documents) and min(sizes) >= 1 and len(sizes) == slices
        assert max(slice_work(documents, sizes, *work)) == pytest.approx(best_of_all(documents, slices, *work))


def test_attention_makes_later_slices_shorter() -> None:
    assert balanced_slices([4096], 4, token_work=1.0, pair_work=0.0) == (1024,) * 4
    sizes = balanced_slices([4096], 4, token_work=0.0, pair_work=1.0)
    # Pairs grow with the square: bounds at the roots of 1/4, 2/4 and 3/4.
    assert sizes == pytest.approx((2048, 848, 651, 549), abs=2)
    assert sorted(sizes, reverse=True) == list(sizes)
    work = slice_work([4096], sizes, 0.0, 1.0)
    assert max(work) / min(work) < 1.01 and sum(work) == 4096 * 4097 / 2
    even = slice_work([4096], (1024,) * 4, 0.0, 1.0)
    assert max(even) / (sum(even) / 4) == pytest.approx(7 / 4, abs=0.01)


def test_work_begins_anew_with_each_document() -> None:
    assert slice_work([3, 2], [3, 2], 0.0, 1.0) == [6.0, 3.0]
    assert slice_work([3, 2], [4, 1], 1.0, 1.0) == [11.0, 3.0]


def test_cuts_are_multiples_of_the_granule() -> None:
    sizes = balanced_slices([1000], 3, token_work=1.0, pair_work=0.1, granule=64)
    assert sum(sizes) == 1000 and all(size % 64 == 0 for size in sizes[:-1])


@pytest.mark.parametrize(
    "options",
    [
        {"slices": 0},
        {"slices": 11},
        {"granule": 6, "slices": 3},
        {"granule": 0},
        {"token_work": -1.0},
        {"token_work": 0.0, "pair_work": 0.0},
    ],
)
def test_what_cannot_be_cut_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="pipeline slices"):
        balanced_slices([10], **{"slices": 2, "token_work": 1.0, "pair_work": 1.0, **options})

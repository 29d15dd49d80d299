"""Pieces that are pinned lie between what is copied; every page is touched, whatever the threads."""

from __future__ import annotations

import mmap

import pytest
import torch

from efflaunch.utils import pages
from efflaunch.utils.pages import advise_huge_pages, pieces, touch


@pytest.mark.parametrize(
    ("num_bytes", "unit", "most", "expected"),
    [
        (0, 4, 8, []),
        (20, 4, 8, [(0, 8), (8, 8), (16, 4)]),
        (20, 3, 8, [(0, 6), (6, 6), (12, 6), (18, 2)]),
        (20, 16, 8, [(0, 16), (16, 4)]),
        (7, 4, 100, [(0, 7)]),
    ],
)
def test_pieces_are_whole_units(num_bytes, unit, most, expected):
    assert list(pieces(num_bytes, unit, most)) == expected


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_the_first_byte_of_every_page_is_written(monkeypatch, threads):
    monkeypatch.setattr(pages, "TOUCH_BYTES", 4 * mmap.PAGESIZE)
    view = torch.full((10 * mmap.PAGESIZE + 5,), 7, dtype=torch.uint8)
    touch(view, threads)
    assert (view == 0).nonzero().flatten().tolist() == list(range(0, view.numel(), mmap.PAGESIZE))


def test_a_failure_of_a_thread_is_raised():
    with pytest.raises(RuntimeError, match="leaf"):
        touch(torch.ones(10, requires_grad=True))


def test_huge_pages_are_asked_for_where_there_are_such(monkeypatch):
    asked = []

    class Memory:
        def madvise(self, advice):
            asked.append(advice)
            if len(asked) > 1:
                raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    assert (advise_huge_pages(Memory()), advise_huge_pages(Memory()), asked) == (True, False, [14, 14])
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert advise_huge_pages(Memory()) is False and len(asked) == 2

"""The best checkpoint's pin: one of ours at a time, and never a person's."""

from __future__ import annotations

from efflaunch.checkpoint.files import PINNED_FILE, step_path
from efflaunch.training.evaluation.pin import is_ours, pin_best


def folders(directory, *steps):
    paths = [step_path(directory, step) for step in steps]
    for path in paths:
        path.mkdir(parents=True)
    return paths


def test_the_pin_moves_on(tmp_path):
    first, second = folders(tmp_path, 5, 10)
    assert pin_best(tmp_path, 5, "eval/web/loss 2.0 at step 5") and is_ours(first)
    assert "eval/web/loss 2.0" in (first / PINNED_FILE).read_text()
    assert pin_best(tmp_path, 10, "better")
    assert is_ours(second) and not (first / PINNED_FILE).exists()


def test_what_a_person_pinned_stays(tmp_path):
    first, second = folders(tmp_path, 5, 10)
    (first / PINNED_FILE).touch()
    assert pin_best(tmp_path, 5, "best") and not is_ours(first)
    assert pin_best(tmp_path, 10, "better")
    assert (first / PINNED_FILE).exists() and is_ours(second)


def test_where_there_is_none_nothing_changes(tmp_path):
    (first,) = folders(tmp_path, 5)
    pin_best(tmp_path, 5, "best")
    assert not pin_best(tmp_path, 7, "better") and is_ours(first)

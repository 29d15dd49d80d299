"""Texts with needles: what is asked for is there, where it was to be, and the same for the same seed."""

from __future__ import annotations

import re

import pytest

from efflaunch.training.evaluation.needle_texts import KEYS, NAMES, VALUES, Draw, NeedleTask, needle_text


def lines(text: str) -> list[str]:
    return re.split(r"(?<=[.?]) ", text)


@pytest.mark.parametrize("task", NeedleTask)
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_the_answer_is_what_the_text_says(task: NeedleTask, depth: float) -> None:
    text = needle_text(task, 50, depth, 7)
    *said, question, _ = lines(text.question)
    needles = [line for line in said if re.search(r"\d|^Let ", line)]
    place = re.search(r"numbers has the (\w+),", question)
    if task is NeedleTask.VARIABLES:
        value = re.search(r"names are (\d+),", question)[1]
        names, held = [], value
        for line in needles:
            name, given = re.match(r"Let (\w+) be (\w+)\.", line).groups()
            assert given == held
            names, held = [*names, name], name
        found = names
    else:
        found = re.findall(rf"A number of the {place[1]} is (\d+)\.", text.question)
    assert text.answer == " " + ", ".join(found)
    counts = {NeedleTask.ONE_KEY: (1, 1), NeedleTask.MANY_KEYS: (1, KEYS), NeedleTask.MANY_VALUES: (VALUES, VALUES)}
    assert (len(found), len(needles)) == counts.get(task, (NAMES, NAMES)) and len(said) == 50 + len(needles)
    if task is not NeedleTask.MANY_VALUES:
        first = next(index for index, line in enumerate(said) if found[0] in line)
        assert sum(line not in needles for line in said[:first]) == round(depth * 50)


def test_texts_depend_on_the_seed_alone() -> None:
    """The numbers are written down: no version of Python may make others of them."""
    assert needle_text(NeedleTask.ONE_KEY, 20, 0.5, 1, 2) == needle_text(NeedleTask.ONE_KEY, 20, 0.5, 1, 2)
    assert needle_text(NeedleTask.ONE_KEY, 20, 0.5, 1, 2) != needle_text(NeedleTask.ONE_KEY, 20, 0.5, 1, 3)
    assert needle_text(NeedleTask.MANY_VALUES, 6, 0.5, 1, 2, 3).answer == " 700258, 223461, 136541, 017356"
    draw = Draw("a")
    assert sorted(draw.some("abcdef", 6)) == list("abcdef") and all(0 <= draw.below(3) < 3 for _ in range(50))

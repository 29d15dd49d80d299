"""Writes texts that ask for something said long before: the tasks of `eval.needles`. Pure; the same for the same seed everywhere.

Note: the tasks are those of RULER (2404.06654, sec. 3): retrieval of one key, of one key among others, of all values of a key, and
variable tracking, where names are given on from one to the next. What stands around them are plain sentences of a few words.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class NeedleTask(Enum):
    """What is asked for."""

    ONE_KEY = "one_key"
    MANY_KEYS = "many_keys"
    MANY_VALUES = "many_values"
    VARIABLES = "variables"


KEYS, VALUES, NAMES = 4, 4, 4
"""Keys of many_keys, values of many_values, names of variables."""
_PLACES = ("harbour", "mill", "tower", "garden", "library", "bridge", "market", "station", "orchard", "lighthouse", "quarry", "chapel")
FILL = (
    "Rain fell on the roofs until the evening.",
    "A cart went slowly down the lane.",
    "The baker put the bread on the shelf.",
    "Two children counted the boats on the river.",
    "Wind moved the leaves of the old trees.",
    "Somebody had left a lamp in the window.",
    "The road to the hills was long and dry.",
    "In the morning the fields were white.",
)


@dataclass(frozen=True, slots=True)
class NeedleText:
    """A text that ends with the answer."""

    question: str
    """All that stands before the answer."""
    answer: str


class Draw:
    """Random whole numbers that depend on the seed alone: nothing but `random()` is asked of Python's generator, which may not change."""

    def __init__(self, *seed: object) -> None:
        digest = hashlib.sha256(" ".join(map(str, seed)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "little"))

    def below(self, end: int) -> int:
        """One of 0 to `end` - 1."""
        return int(self._random.random() * end)

    def some(self, things: Sequence[str], count: int) -> list[str]:
        """`count` different ones of `things`, in an order of their own."""
        left = list(things)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def needle_text(task: NeedleTask, sentences: int, depth: float, *seed: object) -> NeedleText:
    """The text of a task with `sentences` sentences around the needles; the first needle asked for stands behind the share `depth` of them.

    `seed`: what names, numbers and the places of the others depend on, beside the task.
    """
    draw = Draw(task.value, *seed)
    at = round(depth * sentences)
    placed, ask, answer = _TASKS[task](draw, at, sentences)
    lines = [draw.some(FILL, 1)[0] for _ in range(sentences)]
    parts: list[str] = []
    for place in range(sentences + 1):
        parts += [needle for where, needle in placed if where == place]
        parts += lines[place : place + 1]
    return NeedleText(" ".join([*parts, ask]), answer)


_Placed = tuple[list[tuple[int, str]], str, str]
"""Needles with the number of sentences before each, the question, and the answer."""


def _number(draw: Draw) -> str:
    return "".join(str(draw.below(10)) for _ in range(6))


def _retrieval(draw: Draw, at: int, sentences: int, keys: int, values: int) -> _Placed:
    places = draw.some(_PLACES, keys)
    found = [(at, _number(draw)), *((draw.below(sentences + 1), _number(draw)) for _ in range(values - 1))]
    placed = [(where, f"A number of the {places[0]} is {value}.") for where, value in found]
    placed += [(draw.below(sentences + 1), f"A number of the {place} is {_number(draw)}.") for place in places[1:]]
    # In the order they are read in; those at one place as they were made.
    answer = ", ".join(value for _, value in sorted(found, key=lambda pair: pair[0]))
    return placed, f"Question: which numbers has the {places[0]}, in their order? Answer:", f" {answer}"


def _variables(draw: Draw, at: int, sentences: int) -> _Placed:
    names = draw.some([f"{first}{second}" for first in "ABCDEFGH" for second in "KLMNPQRS"], NAMES)
    value = _number(draw)
    # Each name is given on behind the one it has its value from.
    places = sorted(at + draw.below(sentences + 1 - at) for _ in names[1:])
    placed = [(at, f"Let {names[0]} be {value}.")]
    placed += [(where, f"Let {name} be {before}.") for where, before, name in zip(places, names, names[1:], strict=False)]
    return placed, f"Question: which names are {value}, in their order? Answer:", f" {', '.join(names)}"


_TASKS = {
    NeedleTask.ONE_KEY: lambda draw, at, sentences: _retrieval(draw, at, sentences, 1, 1),
    NeedleTask.MANY_KEYS: lambda draw, at, sentences: _retrieval(draw, at, sentences, KEYS, 1),
    NeedleTask.MANY_VALUES: lambda draw, at, sentences: _retrieval(draw, at, sentences, 1, VALUES),
    NeedleTask.VARIABLES: _variables,
}

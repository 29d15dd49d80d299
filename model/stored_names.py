"""Names of parameters in files: Hugging Face fuses the experts of a layer into one weight, and its files have one tensor per expert. Pure.

Both forms are read; what is written is the one that is published, which every version of transformers reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .families.facts import FamilyFacts

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
"""The fused weights of a layer's experts: (E, 2 I, M), gate before up, and (E, M, I)."""
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One tensor of a file and the part of a parameter that it fills."""

    name: str
    shape: Shape
    expert: int | None = None
    """Index on the parameter's first axis; None: the tensor is the whole parameter."""
    first_row: int = 0
    """Where its rows start on the parameter's second axis."""


def has_tensors_by_expert(names: Iterable[str], facts: FamilyFacts) -> bool:
    """Whether files with these names have one tensor per expert."""
    if facts.experts is None or facts.experts.stored is None:
        return False
    stored = facts.experts.stored
    ends = [re.compile(rf"\.{re.escape(name).replace(re.escape('{}'), '[0-9]+')}$") for name in (stored.gate, stored.up, stored.down)]
    return any(end.search(name) for name in names for end in ends)


def stored_parts(shapes: Mapping[str, Shape], facts: FamilyFacts, *, by_expert: bool) -> dict[str, tuple[StoredPart, ...]]:
    """The tensors that fill each parameter, from the parameters' shapes; in files with one tensor per expert, or fused as modules are."""
    if not by_expert:
        return {name: (StoredPart(name, shape),) for name, shape in shapes.items()}
    return {name: tuple(_parts(name, shape, facts)) for name, shape in shapes.items()}


def _parts(name: str, shape: Shape, facts: FamilyFacts) -> Iterable[StoredPart]:
    assert facts.experts is not None and facts.experts.stored is not None
    match, stored = _LAYER.fullmatch(name), facts.experts.stored
    layer, own = (match[1], match[2]) if match is not None else ("", name)
    if own == GATE_UP:
        count, rows, columns = shape
        for expert in range(count):
            yield StoredPart(layer + stored.gate.format(expert), (rows // 2, columns), expert)
            yield StoredPart(layer + stored.up.format(expert), (rows // 2, columns), expert, rows // 2)
    elif own == DOWN:
        count, rows, columns = shape
        yield from (StoredPart(layer + stored.down.format(expert), (rows, columns), expert) for expert in range(count))
    else:
        yield StoredPart(layer + stored.renamed.get(own, own), shape)

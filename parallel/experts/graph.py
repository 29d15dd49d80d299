"""Tasks of one phase as flat tables: what each occupies, how long, and what it needs. Loops that numba compiles where it is installed.

A phase is the forward or the backward pass of some equal layers. Their places count in the order in which the phase meets them. A
layer's rows are cut into `parts` of the batch, and the experts' rows of each part into `degree` chunks. Ids of tasks are topological.

`graph` = (operator, place, part, chunk, resource, seconds, need_end, need, gradient):
    need[need_end[j - 1]:need_end[j]]  tasks that task j waits for
    gradient[j]                        the place whose dense gradient is complete with this task and its like, or -1
`pieces` = (elements, low, high, place, slot): reductions that are tasks. Piece k takes gradients of places low[k] to high[k], and stands
in orders at a place's slot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ...utils.numba_jit import compile_functions
from .cost import Operator

OPERATOR, PLACE, PART, CHUNK, RESOURCE, SECONDS, NEED_END, NEED, GRADIENT = range(9)
"""Places in `graph`."""
OPERATORS, RESOURCES = 13, 3
FILLER = 1e6
"""Above every key that is a time."""
ATTENTION, DISPATCH, EXPERTS, COMBINE = int(Operator.ATTENTION), int(Operator.DISPATCH), int(Operator.EXPERTS), int(Operator.COMBINE)
EXPERT_GATHER, EXPERT_SCATTER = int(Operator.EXPERT_GATHER), int(Operator.EXPERT_SCATTER)
EXPERT_WEIGHTS, ATTENTION_WEIGHTS, REDUCE = int(Operator.EXPERT_WEIGHTS), int(Operator.ATTENTION_WEIGHTS), int(Operator.REDUCE)
WEIGHTS = (EXPERT_WEIGHTS, ATTENTION_WEIGHTS)

_MIXTURE = (Operator.DISPATCH, Operator.EXPERT_GATHER, Operator.EXPERTS, Operator.EXPERT_SCATTER, Operator.COMBINE)
_ATTENTION = (Operator.ATTENTION_GATHER, Operator.ATTENTION, Operator.ATTENTION_SCATTER)
FORWARD = np.array([*_ATTENTION, Operator.GATE, *_MIXTURE], dtype=np.int64)
BACKWARD = np.array([Operator.INVERSE_ORDER, *_MIXTURE, Operator.GATE, *_ATTENTION, *WEIGHTS], dtype=np.int64)
"""Operators of a layer in the order in which one part of its batch passes through them; deferred weight gradients come last."""


def is_chunked(operator: int) -> bool:
    """Whether an operator works on chunks of the experts' rows."""
    return DISPATCH <= operator <= COMBINE or operator == EXPERT_WEIGHTS


def block_of(place: int, part: int, operator: int, parts: int) -> int:
    """The place of an operator's tasks in tables of blocks."""
    return (place * parts + part) * OPERATORS + operator


def width_of(operator: int, alpha: Any, work: Any) -> int:
    """Tasks of one chunk: one for each resource it occupies."""
    width = 0
    for resource in range(RESOURCES):
        if alpha[operator * RESOURCES + resource] + work[operator * RESOURCES + resource] > 0:
            width += 1
    return width


def add_block(need: Any, many: int, first: int, length: int) -> int:
    """Append a run of tasks to the needs, and return how many needs there are."""
    for task in range(first, first + length):
        need[many] = task
        many += 1
    return many


def needs_of_first(need: Any, many: int, place: int, part: int, parts: int, horizon: int, first: Any, length: Any) -> int:
    """Append what a layer's part waits for: its weight gradients may be deferred by `horizon` layers and no more."""
    if horizon > 0 and place >= horizon:
        for operator in WEIGHTS:
            block = block_of(place - horizon, part, operator, parts)
            many = add_block(need, many, first[block], length[block])
    return many


def needs_of_chunk(need: Any, many: int, operator: int, chunk: int, before: int, degree: int, first: Any, length: Any) -> int:
    """Append what a chunk waits for of the block before it: the same chunk where both are chunked, else all of it."""
    if before < 0:
        return many
    if is_chunked(operator) and is_chunked(before % OPERATORS):
        width = length[before] // degree
        return add_block(need, many, first[before] + chunk * width, width)
    return add_block(need, many, first[before], length[before])


def gradient_block(place: int, part: int, parts: int, length: Any) -> int:
    """The block with which the dense gradient of a layer's part is complete."""
    later = block_of(place, part, ATTENTION_WEIGHTS, parts)
    return later if length[later] > 0 else block_of(place, part, ATTENTION, parts)


def add_operator(tables: Any, counts: Any, block: int, source: int, opens: bool, shape: Any, alpha: Any, work: Any) -> None:
    """Append all tasks of one block. `source` is the block it follows; a block that opens a layer waits for deferred gradients too."""
    operator_of, place_of, part_of, chunk_of, resource_of, seconds, need_end, need, first, length = tables
    _, parts, degree, horizon = shape
    operator, part, place = block % OPERATORS, block // OPERATORS % parts, block // OPERATORS // parts
    chunks = degree if is_chunked(operator) else 1
    count, many = counts[0], counts[1]
    first[block], length[block] = count, chunks * width_of(operator, alpha, work)
    for chunk in range(chunks):
        for resource in range(RESOURCES):
            at = operator * RESOURCES + resource
            if alpha[at] + work[at] <= 0:
                continue
            many = needs_of_chunk(need, many, operator, chunk, source, degree, first, length)
            if opens:
                many = needs_of_first(need, many, place, part, parts, horizon, first, length)
            operator_of[count], place_of[count], part_of[count], chunk_of[count] = operator, place, part, chunk
            resource_of[count], seconds[count], need_end[count] = resource, alpha[at] + work[at] / (parts * chunks), many
            count += 1
    counts[0], counts[1] = count, many


def add_layers(tables: Any, counts: Any, sequence: Any, shape: Any, alpha: Any, work: Any) -> None:
    """Append the tasks of all layers, part by part; an operator that takes no time has none."""
    layers, parts = shape[0], shape[1]
    last = np.full(parts, -1, np.int64)
    for place in range(layers):
        for part in range(parts):
            opens = True
            for operator in sequence:
                if width_of(operator, alpha, work) == 0:
                    continue
                block = block_of(place, part, operator, parts)
                if operator in WEIGHTS:
                    source = block_of(place, part, EXPERTS if operator == EXPERT_WEIGHTS else ATTENTION, parts)
                    add_operator(tables, counts, block, source, False, shape, alpha, work)
                else:
                    add_operator(tables, counts, block, last[part], opens, shape, alpha, work)
                    last[part] = block
                    opens = False


def add_pieces(tables: Any, counts: Any, parts: int, pieces: Any, reduction: Any) -> None:
    """Append reductions that are tasks."""
    operator_of, place_of, part_of, chunk_of, resource_of, seconds, need_end, need, first, length = tables
    for k in range(len(pieces[0])):
        count, many = counts[0], counts[1]
        for place in range(pieces[1][k], pieces[2][k] + 1):
            for part in range(parts):
                block = gradient_block(place, part, parts, length)
                many = add_block(need, many, first[block], length[block])
        operator_of[count], place_of[count], part_of[count], chunk_of[count] = REDUCE, pieces[3][k], parts - 1, k
        resource_of[count], seconds[count], need_end[count] = int(reduction[0]), reduction[1] + pieces[0][k] * reduction[2], many
        counts[0], counts[1] = count + 1, many


def build(alpha: Any, work: Any, sequence: Any, shape: Any, pieces: Any, reduction: Any) -> Any:
    """The graph of a phase of `shape` = (layers, parts, degree, horizon).

    alpha[operator * 3 + resource] and `work` are seconds; `reduction` = (resource, alpha_s, element_s).
    """
    layers, parts, degree, _ = shape
    blocks = layers * parts
    size = blocks * len(sequence) * 2 * degree + len(pieces[0])
    # Most needs: two a chunk, whole blocks for what is not chunked, and weight gradients for the first tasks of a layer.
    most = 2 * size + blocks * 24 * degree + blocks * parts * (degree + 1) * 2 * degree + len(pieces[0]) * blocks * 2
    tables = (
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.float64),
        np.empty(size, np.int64),
        np.empty(most, np.int64),
        np.zeros(blocks * OPERATORS, np.int64),
        np.zeros(blocks * OPERATORS, np.int64),
    )
    counts = np.zeros(2, np.int64)
    add_layers(tables, counts, sequence, shape, alpha, work)
    gradient = np.full(size, -1, np.int64)
    first, length = tables[8], tables[9]
    for place in range(layers):
        for part in range(parts):
            block = gradient_block(place, part, parts, length)
            gradient[first[block] : first[block] + length[block]] = place
    add_pieces(tables, counts, parts, pieces, reduction)
    n = counts[0]
    return (
        tables[0][:n],
        tables[1][:n],
        tables[2][:n],
        tables[3][:n],
        tables[4][:n],
        tables[5][:n],
        tables[6][:n],
        tables[7][: counts[1]],
        gradient[:n],
    )


def upward_rank(need_end: Any, need: Any, seconds: Any) -> Any:
    """Seconds from the start of each task to the end of the longest way on from it."""
    count = len(need_end)
    rank = np.zeros(count)
    for back in range(count):
        task = count - 1 - back
        rank[task] += seconds[task]
        begin = need_end[task - 1] if task > 0 else 0
        for at in range(begin, need_end[task]):
            if rank[task] > rank[need[at]]:
                rank[need[at]] = rank[task]
    return rank


def keys_in_order(graph: Any, parts: int, rank: Any, slots: Any, interleaved: bool) -> Any:
    """Keys that put tasks in the order of places, parts, rank[operator] and chunks; pieces at their slots.

    `interleaved`: an exchange and what follows it alternate by chunk: dispatch 0, gather 0, dispatch 1, gather 1.
    """
    operators, places, part_of, chunks = graph[OPERATOR], graph[PLACE], graph[PART], graph[CHUNK]
    key = np.empty(len(operators))
    for task in range(len(operators)):
        operator, chunk = operators[task], chunks[task]
        at, minor = rank[operator], 2 * chunk
        if operator == REDUCE:
            at, minor = slots[chunk], chunk
        elif interleaved and operator == EXPERT_GATHER:
            at, minor = rank[DISPATCH], 2 * chunk + 1
        elif interleaved and operator == COMBINE:
            at, minor = rank[EXPERT_SCATTER], 2 * chunk + 1
        key[task] = ((places[task] * parts + part_of[task]) * 100.0 + at) * 10000.0 + minor
    return key


def keys_by_rank(graph: Any, layers: int, stagger: float) -> Any:
    """Keys that put first what the longest way leads on from; deferred gradients and reductions fill what is left.

    Each part of a batch counts as `stagger` layers less urgent than the one before it: equal parts would ask for the same links together.
    """
    key = -upward_rank(graph[NEED_END], graph[NEED], graph[SECONDS])
    stagger_s = -key.min() / layers * stagger
    for task in range(len(key)):
        operator = graph[OPERATOR][task]
        if operator in WEIGHTS:
            key[task] = FILLER + task
        elif operator == REDUCE:
            key[task] = 2 * FILLER + task
        else:
            key[task] += stagger_s * graph[PART][task]
    return key


FUNCTIONS = (
    is_chunked,
    block_of,
    width_of,
    add_block,
    needs_of_first,
    needs_of_chunk,
    gradient_block,
    add_operator,
    add_layers,
    add_pieces,
    build,
    upward_rank,
    keys_in_order,
    keys_by_rank,
)


@lru_cache(maxsize=1)
def builders() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(build, keys_in_order, keys_by_rank), through numba where that is installed."""
    namespace = compile_functions(FUNCTIONS, globals())
    if namespace is None:
        return build, keys_in_order, keys_by_rank
    return namespace["build"], namespace["keys_in_order"], namespace["keys_by_rank"]

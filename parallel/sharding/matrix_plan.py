"""Decides which rank works on which whole matrix, and in which round, where ranks hold parts of each. Pure, no torch.

Muon (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; J. Liu et al., "Muon is Scalable for LLM Training",
arXiv 2502.16982) replaces a matrix's momentum by the orthogonal matrix nearest to it, and needs the whole of it for that. One rank
does it for all. Work goes in rounds: in one, every rank has matrices of about the same work, and what the next round needs travels
meanwhile. A round holds no more of a rank than the largest matrix takes, so memory does not depend on how many there are.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence

Shape = tuple[int, int]
"""Rows and columns of a matrix."""
Round = tuple[tuple[int, ...], ...]
"""Numbers of the matrices of each rank."""


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight of a decoder layer is a matrix, or a stack of them: Muon's. Embedding, head, norms, biases and vectors are not.

    So in the two papers above; routers and experts are matrices like others (GLM-4.5, arXiv 2508.06471, leaves to AdamW the
    embedding, biases and norms alone, the head here as well).
    """
    return ".layers." in f".{name}" and len(shape) >= 2 and min(shape[-2:]) > 1 and not name.endswith("bias")


def orthogonalise_flops(shape: Shape, steps: int) -> float:
    """FLOPs of `steps` of Newton-Schulz on an m x n matrix, m <= n: X X^T (2 m^2 n), its square (2 m^3), and a product with X."""
    small, large = sorted(shape)
    return steps * (4.0 * small * small * large + 2.0 * small**3)


def spread_matrices(shapes: Sequence[Shape], num_ranks: int) -> tuple[Round, ...]:
    """Rounds in which each of the matrices has one rank: the largest first, smaller ones beside each other in the work of one large one.

    The same on every rank. ValueError without ranks.
    """
    if num_ranks < 1:
        raise ValueError(f"{len(shapes)} matrices over {num_ranks} ranks")
    waiting: dict[Shape, deque[int]] = defaultdict(deque)
    for number, (rows, columns) in enumerate(shapes):
        waiting[min(rows, columns), max(rows, columns)].append(number)
    kinds = sorted(waiting, key=lambda kind: (-orthogonalise_flops(kind, 1), kind))
    room = max((rows * columns for rows, columns in shapes), default=0)
    rounds = []
    while left := [kind for kind in kinds if waiting[kind]]:
        rounds.append(_one_round(left, waiting, num_ranks, room))
    return tuple(rounds)


def _one_round(kinds: list[Shape], waiting: dict[Shape, deque[int]], num_ranks: int, room: int) -> Round:
    target = orthogonalise_flops(kinds[0], 1)
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    chosen: list[list[int]] = [[] for _ in range(num_ranks)]
    for kind in kinds:
        work, numbers = orthogonalise_flops(kind, 1), kind[0] * kind[1]
        while waiting[kind] and loads[0][0] + work <= target and loads[0][1] + numbers <= room:
            load, held, rank = loads[0]
            chosen[rank].append(waiting[kind].popleft())
            heapq.heapreplace(loads, (load + work, held + numbers, rank))
    return tuple(tuple(numbers) for numbers in chosen)


def slowest_flops(shapes: Sequence[Shape], rounds: Sequence[Round], steps: int) -> float:
    """FLOPs of the rank with most to do in each round, summed: what a step waits for."""
    return sum(max(sum(orthogonalise_flops(shapes[number], steps) for number in numbers) for numbers in each) for each in rounds)

"""Decides who keeps whose image, and which images make up a checkpoint. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .stream import Address


def keepers_of(rank: int, nodes: Sequence[str]) -> tuple[int, ...]:
    """Ranks whose keepers hold the image of `rank`; `nodes`: the node of every rank.

    With several nodes its own, for restarts on the same nodes, and one on the next node, for the loss of one. With one node
    the next rank's: a second copy on the same machine would be lost with the first.
    """
    order = list(dict.fromkeys(nodes))
    if len(order) == 1:
        return ((rank + 1) % len(nodes),)
    here = [other for other, node in enumerate(nodes) if node == nodes[rank]]
    following = order[(order.index(nodes[rank]) + 1) % len(order)]
    there = [other for other, node in enumerate(nodes) if node == following]
    return (rank, there[here.index(rank) % len(there)])


def keeper_bytes(node: str, nodes: Sequence[str], state_bytes: Sequence[int]) -> int:
    """Most that keepers of a node hold: two images of every rank they keep, one of which arrives."""
    return sum(2 * size for rank, size in enumerate(state_bytes) for keeper in keepers_of(rank, nodes) if nodes[keeper] == node)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One image in one keeper."""

    attempt: str
    step: int
    rank: int
    world_size: int
    manifest: str
    """Hash of its manifest; empty: the image is not complete."""
    address: Address

    @classmethod
    def from_json(cls, fields: dict[str, Any], address: Address) -> StoredImage:
        facts = (str(fields["attempt"]), int(fields["step"]), int(fields["rank"]), int(fields["world_size"]))
        return cls(*facts, str(fields["manifest"]), address)


@dataclass(frozen=True, slots=True)
class ReplicaSet:
    """Images of all ranks of one attempt."""

    attempt: str
    step: int
    manifests: tuple[str, ...]
    """Hash of each rank's manifest."""
    keepers: tuple[tuple[Address, ...], ...]
    """Addresses of each rank's keepers."""


def solve_set(stored: Sequence[StoredImage]) -> tuple[ReplicaSet | None, list[str]]:
    """The newest whole set, and why newer ones are none, newest first."""
    by_attempt: dict[tuple[int, str], list[StoredImage]] = defaultdict(list)
    for image in stored:
        by_attempt[image.step, image.attempt].append(image)
    missing: list[str] = []
    for (step, attempt), images in sorted(by_attempt.items(), reverse=True):
        complete: dict[int, list[StoredImage]] = defaultdict(list)
        for image in images:
            if image.manifest and all(other.manifest == image.manifest for other in complete[image.rank]):
                complete[image.rank].append(image)
        lost = [rank for rank in range(images[0].world_size) if not complete[rank]]
        if not lost:
            ranks = range(images[0].world_size)
            manifests = tuple(complete[rank][0].manifest for rank in ranks)
            return ReplicaSet(attempt, step, manifests, tuple(tuple(i.address for i in complete[rank]) for rank in ranks)), missing
        missing.append(f"step {step}: no image of rank {', '.join(map(str, lost))}")
    return None, missing

"""One node among those of a run, whatever gave them to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlace:
    """This agent's node."""

    node: int
    """Among the nodes of the attempt, from 0: the head."""
    num_nodes: int
    name: str
    folder: str
    """What the launcher's part of a run leaves there, inside the run directory."""
    exclude_key: str
    """The key that leaves nodes out."""
    ends_with_others: bool = False
    """Whether the scheduler ends this agent as soon as that of another node fails."""

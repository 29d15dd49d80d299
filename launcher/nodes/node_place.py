"""One node among those of a run, whatever gave them to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlace:
    """Number, name and folder of this agent's node."""

    node: int
    """Number of the node in the attempt, from 0: the head."""
    num_nodes: int
    name: str
    folder: str
    """Folder for the launcher's own files, inside the run directory."""
    exclude_key: str
    """The key that leaves nodes out."""
    ends_with_others: bool = False
    """Whether the scheduler ends this agent as soon as that of another node fails."""

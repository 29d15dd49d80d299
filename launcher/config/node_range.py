"""The nodes that launcher.nodes=MIN:MAX allows, and cluster.num_nodes that follows from it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...errors import ConfigError
from .run_config import Config


@dataclass(frozen=True, slots=True)
class NodeRange:
    """`least` to `most` nodes, both included."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"

    def __contains__(self, num_nodes: int) -> bool:
        return self.least <= num_nodes <= self.most


def node_range(config: Config) -> NodeRange:
    """Parse launcher.nodes; without it the range is cluster.num_nodes alone."""
    if config.launcher.nodes is None:
        return NodeRange(config.cluster.num_nodes, config.cluster.num_nodes)
    least, _, most = config.launcher.nodes.partition(":")
    return NodeRange(int(least), int(most or least))


def resolve_nodes(config: Config, given: Iterable[str] = ()) -> Config:
    """`config` with cluster.num_nodes as launcher.nodes has it, the most; ConfigError where a person typed (`given`: keys) both, apart."""
    wanted = node_range(config)
    if not 1 <= wanted.least <= wanted.most:
        expected = "MIN:MAX with 1 <= MIN <= MAX, or one number"
        hint = f"launcher.nodes={max(1, min(wanted.least, wanted.most))}:{max(1, wanted.least, wanted.most)}"
        raise ConfigError("launcher.nodes", found=str(config.launcher.nodes), expected=expected, hint=hint)
    if "cluster.num_nodes" in given and config.cluster.num_nodes != wanted.most:
        conflict = f"{config.cluster.num_nodes} with launcher.nodes={wanted}"
        expected = f"{wanted.most}, or only one of the two"
        raise ConfigError(
            "cluster.num_nodes", found=conflict, expected=expected, hint="launcher.nodes=MIN:MAX alone, or launcher.nodes=null"
        )
    return _with_nodes(config, wanted.most)


def _with_nodes(config: Config, num_nodes: int) -> Config:
    return replace(config, cluster=replace(config.cluster, num_nodes=num_nodes))

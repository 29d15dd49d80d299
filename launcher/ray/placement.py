"""Reserves the nodes of a run: demand against offers, as a table, and the placement group."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError

_LOOK_S = 0.5
_PATIENCE_S = 5.0
"""Seconds without nodes after which the reason is printed."""
_MIN_ID = 6
"""Letters of a node id that name it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeOffer:
    """A live node of the cluster."""

    id: str
    host: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    def is_called(self, name: str) -> bool:
        """Return whether `name` means this node: by host name, address, node id, or host/id where several share a machine."""
        host, _, start = name.rpartition("/")
        is_mine = len(start) >= _MIN_ID and self.id.startswith(start)
        return is_mine if host else is_mine or name in (self.host, self.address)

    def has(self, bundle: Mapping[str, float]) -> bool:
        """Return whether the node could hold the bundle if it did nothing else."""
        return all(self.total.get(name, 0.0) >= amount for name, amount in bundle.items())

    def can(self, bundle: Mapping[str, float]) -> bool:
        """Return whether the node can hold the bundle now."""
        return all(self.free.get(name, 0.0) >= amount for name, amount in bundle.items())


def fitting(offers: Sequence[NodeOffer], bundle: Mapping[str, float], exclude: Sequence[str]) -> list[NodeOffer]:
    """Nodes that could hold the bundle and are not left out: as many as a run can have."""
    return [offer for offer in offers if offer.has(bundle) and not any(offer.is_called(name) for name in exclude)]


def demand_table(offers: Sequence[NodeOffer], bundle: Mapping[str, float], num_nodes: int, exclude: Sequence[str]) -> str:
    """Format the demand and what every node has of it; nodes that cannot hold it come first."""
    wanted = ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
    rows = []
    for offer in offers:
        parts = [f"{name} {offer.free.get(name, 0.0):g} free of {offer.total.get(name, 0.0):g}" for name in bundle]
        left_out = any(offer.is_called(name) for name in exclude)
        word = "left out" if left_out else "too small" if not offer.has(bundle) else "ok" if offer.can(bundle) else "busy"
        rows.append((word == "ok", f"{word:<10}{offer.host} {offer.address} {offer.id[:8]}  {', '.join(parts)}"))
    lines = [line for _, line in sorted(rows, key=lambda row: row[0])] or ["no nodes at all"]
    return "\n".join([f"wanted on each of {num_nodes} nodes: {wanted}", *lines])


def no_placement(
    offers: Sequence[NodeOffer], bundle: Mapping[str, float], num_nodes: int, exclude: Sequence[str], timeout_s: float
) -> ConfigError:
    """The error for a run that got no nodes in time."""
    able = fitting(offers, bundle, exclude)
    if len(able) < num_nodes:
        offered = f"{len(able)} nodes that could hold it"
        hint = f"cluster.num_nodes={max(1, len(able))}, fewer resources for each, or more nodes in the cluster"
    else:
        offered = f"{sum(offer.can(bundle) for offer in able)} nodes that are free"
        hint = "a larger launcher.ray.placement_timeout_s, or end what holds them: ray list placement-groups"
    table = demand_table(offers, bundle, num_nodes, exclude)
    return ConfigError(
        f"nodes of the Ray cluster, after {timeout_s:g} s",
        found=offered,
        expected=f"{num_nodes} that are free for this run\n{table}\n",
        hint=hint,
    )


def node_offers() -> list[NodeOffer]:
    """The cluster as Ray sees it now, but for nodes that are about to be taken away."""
    import ray
    from ray._private.state import available_resources_per_node

    free, leaving = available_resources_per_node(), draining()
    return [
        NodeOffer(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def reserve(
    bundle: Mapping[str, float],
    num_nodes: int,
    exclude: Sequence[str],
    *,
    timeout_s: float,
    is_over: Callable[[], bool],
    say: Callable[[str], None],
) -> Any:
    """A placement group with one bundle on each of `num_nodes` different nodes; None where `is_over` said so first.

    ConfigError, with demand against what every node has, where it does not come about in time.
    """
    from ray.util import placement_group, remove_placement_group

    left_out = [offer.id for offer in node_offers() if any(offer.is_called(name) for name in exclude)]
    selector = [{"ray.io/node-id": f"!in({','.join(left_out)})"}] * num_nodes if left_out else None
    group = placement_group([dict(bundle)] * num_nodes, strategy="STRICT_SPREAD", bundle_label_selector=selector)
    start, is_announced = time.monotonic(), False
    while not group.wait(_LOOK_S):
        waited = time.monotonic() - start
        if waited > timeout_s or is_over():
            remove_placement_group(group)
            if waited > timeout_s:
                raise no_placement(node_offers(), bundle, num_nodes, exclude, timeout_s)
            return None
        if not is_announced and waited > _PATIENCE_S:
            is_announced = True
            say(f"waiting for nodes, at most {timeout_s:g} s\n{demand_table(node_offers(), bundle, num_nodes, exclude)}")
    return group


def draining() -> set[str]:
    """Ids of nodes that are about to be taken away: a preemption notice, or an autoscaler that takes them back."""
    from ray._private.state import state

    return set(state.get_draining_nodes())

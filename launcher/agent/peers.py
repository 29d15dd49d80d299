"""The other nodes of an attempt, as the agent of one node meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .hang_watch import Others

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from .elastic import RankAgent


class Peers(Protocol):
    """What an `Agent` shares with the agents of other nodes. `NoPeers`: a run on one node; `nodes.node.NodePeers`: one among several.

    The agent calls it from its own thread, never from a signal handler.
    """

    @property
    def writes_state(self) -> bool:
        """Whether the agent of this node is the one that writes state.json."""
        ...

    @property
    def end_reason(self) -> str | None:
        """Why `look` had healthy ranks of this node ended; None: it did not."""
        ...

    def ranks(self, ranks_per_node: int) -> range:
        """Numbers of this node's ranks."""
        ...

    def rendezvous(self, run_id: str, timeout_s: int) -> StaticTCPRendezvous:
        """The place where the ranks of all nodes meet."""
        ...

    def others(self) -> Others | None:
        """The agents with which a hang is judged; None: there are none."""
        ...

    def look(self, ranks: RankAgent, kill_now: Callable[[], None]) -> None:
        """Called a few times a second while ranks run. `kill_now` ends them at once, as SIGQUIT does."""
        ...


class NoPeers:
    """`Peers` of an agent whose node is the only one."""

    writes_state = True
    end_reason = None

    def ranks(self, ranks_per_node: int) -> range:
        """All ranks of the run."""
        return range(ranks_per_node)

    def rendezvous(self, run_id: str, timeout_s: int) -> StaticTCPRendezvous:
        """Meet on this machine's loopback."""
        from .elastic import LoopbackRendezvous

        return LoopbackRendezvous(run_id, timeout_s)

    def others(self) -> Others | None:
        """None: this node judges its hangs by itself."""
        return None

    def look(self, ranks: RankAgent, kill_now: Callable[[], None]) -> None:
        """Nothing to look at."""

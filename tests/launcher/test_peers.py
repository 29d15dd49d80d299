"""The agent of a run on one node: it has no peers."""

from __future__ import annotations

from efflaunch.launcher.agent.peers import NoPeers, Peers


def test_one_node_has_all_ranks_and_judges_alone() -> None:
    peers: Peers = NoPeers()
    assert peers.ranks(4) == range(4) and peers.others() is None
    assert peers.writes_state and peers.end_reason is None

"""Cores beside a device, from files as Linux writes them."""

from __future__ import annotations

import pytest

from efflaunch.cluster.numa import cores_of, numa_node, parse_cores


@pytest.fixture
def sysfs(tmp_path):
    """Two sockets, GPUs at 1b and 9a; one at 3c of which nothing is known."""
    for address, node in (("0000:1b:00.0", "0\n"), ("0001:9a:02.0", "1\n"), ("0000:3c:00.0", "-1\n"), ("0000:3d:00.0", "7\n")):
        folder = tmp_path / "bus" / "pci" / "devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(node)
    for node, cores in enumerate(("0-3,8-11\n", "4-7,12-15\n")):
        folder = tmp_path / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores)
    return tmp_path


def test_lists_of_cores(sysfs):
    assert parse_cores("0-2,5\n") == {0, 1, 2, 5} and parse_cores("\n") == frozenset()
    assert numa_node("0000:1B:00.0", sysfs) == 0 and numa_node("0000:3c:00.0", sysfs) is None
    assert cores_of(1, sysfs) == {4, 5, 6, 7, 12, 13, 14, 15} and cores_of(5, sysfs) is None
    with pytest.raises(ValueError, match="x"):
        parse_cores("x-3")

"""Which cores are beside a GPU, as Linux says it. What is unknown is None, never a guess."""

from __future__ import annotations

from pathlib import Path

SYSFS = Path("/sys")


def parse_cores(text: str) -> frozenset[int]:
    """Cores of a list as the kernel writes it: `0-3,8,10-11`. ValueError where it is none."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def numa_node(pci_address: str, sysfs: Path = SYSFS) -> int | None:
    """The NUMA node that a PCI device (`0000:1b:00.0`) belongs to; None where the system does not say, as in most virtual machines."""
    text = _read(sysfs / "bus" / "pci" / "devices" / pci_address.lower() / "numa_node")
    try:
        node = int(text or "")
    except ValueError:
        return None
    return node if node >= 0 else None


def cores_of(node: int, sysfs: Path = SYSFS) -> frozenset[int] | None:
    """The cores of a NUMA node; None where the system does not say."""
    text = _read(sysfs / "devices" / "system" / "node" / f"node{node}" / "cpulist")
    try:
        return parse_cores(text or "") or None
    except ValueError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None

"""Finds where the nodes of a job meet: an address other nodes can reach, and a port that is free."""

from __future__ import annotations

import ipaddress
import socket

from ...errors import ConfigError, EfflaunchError

_FIRST_PORT, _NUM_PORTS, _NUM_TRIES = 20000, 10000, 64
"""Below the range from which kernels hand out ports."""


def head_address(host: str, interface: str | None, key: str = "launcher.slurm.interface") -> str:
    """The IPv4 address by which other nodes reach this one; ConfigError where it is none they could reach.

    `key` names the interface in the configuration. There is no fallback: a node that took its own loopback for the
    head would wait for the others for ever.
    """
    if interface is not None:
        return address_of(interface, key)
    try:
        entries = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise _unreachable(host, key, f"no address ({error.strerror})") from error
    addresses = [str(entry[4][0]) for entry in entries]
    usable = [address for address in addresses if not _is_useless(address)]
    if not usable:
        raise _unreachable(host, key, f"only {', '.join(sorted(set(addresses)))}")
    return usable[0]


def _is_useless(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_unspecified


def _unreachable(host: str, key: str, problem: str) -> ConfigError:
    return ConfigError(
        f"address of node {host}",
        found=problem,
        expected="an IPv4 address that the other nodes can reach",
        hint=f"{key}={next(iter(_interfaces()), 'eth0')}",
    )


def _interfaces() -> dict[str, str]:
    """Interfaces other nodes may be behind, with their IPv4 addresses."""
    import psutil

    pairs = (
        (name, entry.address) for name, entries in psutil.net_if_addrs().items() for entry in entries if entry.family == socket.AF_INET
    )
    return {name: address for name, address in pairs if not _is_useless(address)}


def address_of(interface: str, key: str) -> str:
    """The IPv4 address of a network interface of this node; ConfigError, with those there are, where it has none."""
    interfaces = _interfaces()
    if interface not in interfaces:
        hint = f"{key}={next(iter(interfaces), 'null')}"
        expected = f"one of {', '.join(interfaces) or 'none: this node has only loopback'}"
        raise ConfigError(key, found=f"{interface!r}", expected=expected, hint=hint)
    return interfaces[interface]


def head_port(job_id: int, address: str) -> int:
    """A free port of `address`, tried from one that follows from the job's number: jobs that share a node start apart."""
    for offset in range(_NUM_TRIES):
        port = _FIRST_PORT + (job_id + offset * 151) % _NUM_PORTS
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise EfflaunchError(f"none of {_NUM_TRIES} ports of {address} is free")


def address_towards(head: str) -> str:
    """Return this node's address on the way to `head`. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has this address, loopback included."""
    import psutil

    return next((name for name, entries in psutil.net_if_addrs().items() if any(entry.address == address for entry in entries)), None)

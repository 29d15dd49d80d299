"""Nodes that are namespaces of this machine: a network with its own address, a host name, mounts and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

TIMEOUT_S = 900.0
_PROGRAMS = ("unshare", "ip")
# The shell is process 1 of the node and reaps what the node leaves behind. Words after it: the node's command.
_SHELL = """\
hostname {name}
mount --bind {directory}/hosts /etc/hosts
mount --bind {directory}/nsswitch.conf /etc/nsswitch.conf
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
"$@" & wait
while :; do wait; sleep 1; done
"""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Name and address of one node, which is a set of namespaces."""

    name: str
    directory: Path
    """Directory of the cluster, with its hosts file and the node's output."""
    address: str
    bridge: str
    link: str
    private: Path | None = None
    """A directory of which the node has an empty one of its own."""


def why_not() -> str | None:
    """Return why there can be no such nodes here; None where there can."""
    if sys.platform != "linux":
        return "nodes in namespaces need Linux"
    if os.geteuid() != 0:
        return "nodes in namespaces need root"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install util-linux iproute2"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"namespaces are not allowed here: {probe.stderr.strip()}"
    bridge = f"probe{os.getpid() % 10**6}"
    probe = subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True, text=True)
    if probe.returncode:
        return f"no bridge can be made here: {probe.stderr.strip()}"
    subprocess.run(["ip", "link", "del", bridge], check=True)
    return None


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Poll until it holds; TimeoutError after a long while."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


class Network:
    """Nodes that hang on one bridge, apart from other processes' as far as a process id goes. Up inside a `with`."""

    def __init__(self, first: int, prefix: str) -> None:
        pid = os.getpid()
        self.net = f"10.{first + pid % 50}.{pid // 50 % 250}"
        self.bridge = f"{prefix}{pid % 10**7}"

    def address(self, node: int) -> str:
        return f"{self.net}.{10 + node}"

    def link(self, node: int) -> str:
        """Name of a node's cable, at this machine's end."""
        return f"{self.bridge}v{node}"

    def space(self, node: int, directory: Path, private: Path | None) -> Space:
        """A node as `start` takes it."""
        where = {"address": self.address(node), "bridge": self.bridge, "link": self.link(node)}
        return Space(name=f"node{node}", directory=directory, private=private, **where)

    def __enter__(self) -> Self:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Start everything, and wait for it."""
        raise NotImplementedError

    def down(self) -> None:
        """Stop everything; nodes die with all that runs on them."""
        raise NotImplementedError


def write_names(directory: Path, addresses: Mapping[str, str]) -> None:
    """Files by which nodes know each other."""
    lines = "".join(f"{address} {name}\n" for name, address in addresses.items())
    (directory / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")
    (directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")


def make_bridge(bridge: str, address: str) -> None:
    """The network the nodes hang on, which this machine is a part of."""
    _sh("ip", "link", "add", bridge, "type", "bridge")
    _sh("ip", "addr", "add", f"{address}/24", "dev", bridge)
    _sh("ip", "link", "set", bridge, "up")


def remove_bridge(bridge: str) -> None:
    """Remove the bridge, if there is one."""
    subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def start(space: Space, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Boot the node with `command` as all it runs."""
    shell = _SHELL.format(name=space.name, directory=space.directory, address=space.address)
    if space.private is not None:
        shell = f"mount -t tmpfs tmpfs {space.private}\n{shell}"
    spaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    with (space.directory / f"{space.name}.out").open("ab") as log:
        node = subprocess.Popen(
            ["unshare", *spaces, "sh", "-c", shell, "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=dict(environment),
            cwd=space.directory,
        )
    own = os.readlink("/proc/self/ns/net")
    wait_until(lambda: os.readlink(f"/proc/{node.pid}/ns/net") != own, f"namespaces of {space.name}")
    _sh("ip", "link", "add", space.link, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
    _sh("ip", "link", "set", space.link, "master", space.bridge, "up")
    return node


def kill(node: subprocess.Popen[bytes], link: str) -> None:
    """End everything on the node at once, as a power cut does."""
    node.kill()
    node.wait()
    # The kernel takes it away with the name space, but not at once.
    subprocess.run(["ip", "link", "del", link], capture_output=True)


def processes(node: subprocess.Popen[bytes]) -> list[tuple[int, str]]:
    """(id as seen from here, command line) of all in the node's process namespace."""
    import psutil

    listed = []
    for process in psutil.Process(node.pid).children(recursive=True):
        try:
            listed.append((process.pid, " ".join(process.cmdline())))
        except psutil.Error:
            continue
    return listed


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)

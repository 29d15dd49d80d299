"""The actor of one node: starts its agent as a process of its own, which dies with the actor, and passes its output on.

Ray's workers import this module, so efflaunch has to be installed where Ray is.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ... import __version__
from ...errors import ConfigError
from ..env import agent_variables
from ..nodes.address import address_of, head_port
from ..rundir.run_dir import HASH_FILE

_MAX_READ = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCard:
    """Id, host name and address of an actor's node."""

    id: str
    host: str
    address: str
    """Address by which Ray's other nodes reach this one."""
    version: str
    """efflaunch's."""


class NodeKeeper:
    """Lives as long as its actor. The agent and its ranks ask the kernel to be killed when it is gone."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] | None = None

    def introduce(self) -> NodeCard:
        """Return the card of the node this actor runs on."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        return NodeCard(id=node_id, host=socket.gethostname(), address=ray.util.get_node_ip_address(), version=__version__)

    def sees(self, run_dir: str) -> tuple[str, str]:
        """(the hash of run.yaml as this node has it, why it cannot work there)."""
        try:
            seen = (Path(run_dir) / HASH_FILE).read_text()
            with tempfile.TemporaryFile(dir=run_dir):
                return seen, ""
        except OSError as error:
            return "", f"run directory: {error.strerror}: {error.filename or run_dir}"

    def meeting_point(self, job: str, interface: str | None) -> tuple[str, int]:
        """Address and free port of this node, for the agents to meet at; ConfigError where the interface has none."""
        import ray

        address = address_of(interface, "launcher.ray.interface") if interface else str(ray.util.get_node_ip_address())
        return address, head_port(zlib.crc32(job.encode()), address)

    def start(self, arguments: list[str], work_dir: str, variables: dict[str, str]) -> None:
        """Start the agent. ConfigError where this node does not have the directory."""
        if not Path(work_dir).is_dir():
            where = f"node {socket.gethostname()}"
            hint = "launcher.ray.work_dir=DIR, a directory that every node has"
            raise ConfigError(where, found=f"no directory {work_dir}", expected="the one the run was submitted from", hint=hint)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the actor
        command = [sys.executable, "-m", "efflaunch.launcher.ray.task", *arguments, "--parent", str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            cwd=work_dir,
            env={**agent_variables(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
        )

    def look(self, offset: int) -> tuple[int | None, bytes]:
        """(exit code of the agent, None while it runs; what it printed from `offset` on)."""
        assert self.process is not None and self.output is not None, "started first"
        code = self.process.poll()
        return code, os.pread(self.output.fileno(), _MAX_READ, offset)

    def signal(self, number: int) -> None:
        """Send the signal to the agent alone; it passes it on to its ranks."""
        assert self.process is not None, "started first"
        if self.process.poll() is None:
            self.process.send_signal(signal.Signals(number))

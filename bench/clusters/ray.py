"""A Ray of several nodes on this machine: every node is a network, host-name, mount and process namespace.

Each node is one `ray start --block`, started in the foreground of its namespace and ended with it: `ray stop` ends every
Ray process it can see, by name. Nodes hang on a bridge of their own, have no route out and no DNS. Node 0 is the head,
with the job server; a token is needed to be let in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import spaces
from .spaces import wait_until

GCS_PORT, SERVER_PORT = 6379, 8265
# A dead node is noticed in fifteen seconds, and not where the machine is only busy.
FAST = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 10,
    "health_check_timeout_ms": 1000,
}
NO_CLOUD = "provider:\n  type: local\n"
"""Provider setting of a head: without it a head asks the clouds' metadata servers which of them it is on."""


def why_not() -> str | None:
    """Return why no cluster can be started here; None where one can."""
    if importlib.util.find_spec("ray") is None:
        return 'no ray: pip install "efflaunch[ray]"'
    return spaces.why_not()


@dataclass
class RayCluster(spaces.Network):
    """Use as a context manager; `environment` is what Ray's clients need."""

    directory: Path
    num_nodes: int = 3
    cpus: int = 4
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables for Ray's own processes and all they start."""
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    private: dict[int, Path] = field(default_factory=dict)
    """Node -> directory of which that node has an empty one of its own."""

    def __post_init__(self) -> None:
        super().__init__(150, "efr")
        self.home = self.directory / "home"
        self.token = secrets.token_hex(16)
        # Paths of sockets must be short.
        self.scratch = Path(tempfile.mkdtemp(prefix="efr"))

    @property
    def server(self) -> str:
        """The job server's address."""
        return f"http://{self.address(0)}:{SERVER_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Return this process's environment with the token, and without what would point to another cluster."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return {**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.home / ".ray" / "auth_token")}

    def up(self) -> None:
        (self.home / ".ray").mkdir(parents=True)
        (self.home / "ray_bootstrap_config.yaml").write_text(NO_CLOUD)
        token = self.home / ".ray" / "auth_token"
        token.write_text(self.token)
        token.chmod(0o600)
        names = [f"node{node}" for node in range(self.num_nodes)]
        spaces.write_names(self.directory, {name: self.address(node) for node, name in enumerate(names)})
        spaces.make_bridge(self.bridge, f"{self.net}.1")
        self.boot(0)
        wait_until(self._answers, "Ray's job server")
        for node in range(1, self.num_nodes):
            self.boot(node)
        self.wait_for_nodes(self.num_nodes)

    def boot(self, node: int) -> None:
        """Start a node, for the first time or after a crash."""
        scratch = self.scratch / str(node)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        space = self.space(node, self.directory, self.private.get(node))
        environment = {
            **self.environment,
            **self.variables,
            "HOME": str(self.home),
            # A job's `python` is this one.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
            **({f"RAY_{name}": str(value) for name, value in FAST.items()}),
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        }
        self.nodes[node] = spaces.start(space, self._command(node, scratch), environment)

    def _command(self, node: int, scratch: Path) -> list[str]:
        address = self.address(node)
        same = [f"--node-ip-address={address}", f"--num-cpus={self.cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]
        head = [
            "--head",
            f"--port={GCS_PORT}",
            f"--dashboard-host={address}",
            f"--dashboard-port={SERVER_PORT}",
            f"--temp-dir={self.scratch / '0'}",
        ]
        rest = [f"--address={self.address(0)}:{GCS_PORT}", f"--temp-dir={scratch}"]
        # The script's own name, as what it starts is found by it.
        ray = str(Path(sys.executable).with_name("ray"))
        return [sys.executable, ray, "start", "--block", *same, *(rest if node else head)]

    def crash(self, node: int) -> None:
        """A power cut: everything on the node is gone at once."""
        spaces.kill(self.nodes.pop(node), self.link(node))

    def _answers(self) -> bool:
        return self.ask("/api/version") is not None

    def ask(self, path: str, method: str = "GET") -> dict[str, Any] | None:
        """Return the job server's answer; None where it gives none, or an error."""
        request = urllib.request.Request(f"{self.server}{path}", headers={"Authorization": f"Bearer {self.token}"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return dict(json.loads(answer.read()))
        except OSError:
            return None

    def alive(self) -> list[str]:
        """Addresses of the nodes that Ray believes alive."""
        return sorted(node["nodeManagerAddress"] for node in self._raylets() if node.get("state") == "ALIVE")

    def _raylets(self) -> list[dict[str, Any]]:
        answer = self.ask("/nodes?view=summary")
        return [node["raylet"] for node in answer["data"]["summary"]] if answer else []

    def drain(self, node: int, deadline_s: int = 600) -> None:
        """Give notice that a node is about to be taken away."""
        (wanted,) = [
            raylet["nodeId"]
            for raylet in self._raylets()
            if raylet["nodeManagerAddress"] == self.address(node) and raylet.get("state") == "ALIVE"
        ]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds", str(deadline_s)]
        where = ["--address", f"{self.address(0)}:{GCS_PORT}", "--node-id", wanted]
        ray = str(Path(sys.executable).with_name("ray"))
        subprocess.run([sys.executable, ray, "drain-node", *where, *reason], env=self.environment, check=True, capture_output=True)

    def wait_for_nodes(self, number: int) -> None:
        """Wait until `number` Ray nodes are alive."""
        wait_until(lambda: len(self.alive()) == number, f"{number} Ray nodes")

    def processes(self) -> list[tuple[int, str]]:
        """(id, command line) of all that runs on the nodes."""
        return [entry for node in self.nodes for entry in self.on_node(node)]

    def on_node(self, node: int) -> list[tuple[int, str]]:
        """Return the processes of one node, as (pid, command line)."""
        return spaces.processes(self.nodes[node])

    def down(self) -> None:
        """Stop everything; nodes die with all that runs on them."""
        for node in list(self.nodes):
            self.crash(node)
        spaces.remove_bridge(self.bridge)
        shutil.rmtree(self.scratch, ignore_errors=True)

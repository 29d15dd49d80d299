"""The contestants of bench/launch.py: where a run is started, and how to hurt and to stop it there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STEPS = "train.steps=1000000"


class Place(Protocol):
    """One start of a run and its life, from which the times are taken."""

    run_dir: Path

    def start(self) -> None:
        """Do what a person would type; returns at once."""
        ...

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        ...

    def lose_node(self) -> bool:
        """Cut the power of a node that is not the first; False where there is only one."""
        ...

    def stop(self) -> None:
        """Send the stop signal."""
        ...

    def ended(self) -> float | None:
        """Return when the run ended, in seconds since 1970; None while it runs."""
        ...

    def check(self) -> None:
        """RuntimeError, with what it printed, where it has ended before it should."""
        ...


@dataclass
class Process:
    """A command in the foreground, and what it printed."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.running = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment)

    def check(self) -> None:
        if self.running is not None and self.running.poll() is not None:
            raise RuntimeError(f"{' '.join(self.command[:4])} ... ended with {self.running.returncode}:\n{self.log.read_text()[-4000:]}")

    def end(self) -> None:
        """Whatever state it is in."""
        if self.running is not None:
            self.running.kill()
            self.running.wait()


class Foreground:
    """A process on this machine: its exit is the end."""

    def __init__(self, run_dir: Path, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.run_dir = run_dir
        self.process = Process(command, run_dir.parent / "output", environment or dict(os.environ))

    def start(self) -> None:
        self.process.start()

    def pid(self, rank: int) -> int:
        return rank_process(self.run_dir, rank)

    def lose_node(self) -> bool:
        return False

    def stop(self) -> None:
        assert self.process.running is not None, "started"
        self.process.running.send_signal(signal.SIGTERM)

    def ended(self) -> float | None:
        assert self.process.running is not None, "started"
        return None if self.process.running.poll() is None else time.time()

    def check(self) -> None:
        self.process.check()


class Bare(Foreground):
    """torch.distributed.run with bench/bare_rank.py: no run directory is kept, nothing is saved."""

    def __init__(self, run_dir: Path, overrides: list[str], ranks: int) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=3"]
        # Without it ranks that are started again meet the old ones' addresses in the agent's store.
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        super().__init__(run_dir, [*command, "-m", "efflaunch.bench.bare_rank", str(run_dir)], environment)
        self.overrides = overrides

    def start(self) -> None:
        from ..launcher.config.compose import compose
        from ..launcher.rundir.run_dir import write_run

        self.run_dir.mkdir(parents=True)
        write_run(self.run_dir, compose(self.overrides), 1)
        super().start()

    def pid(self, rank: int) -> int:
        return int((self.run_dir / f"rank-{rank}.pid").read_text())


class Handed:
    """A run handed to a cluster of bench/clusters: the end is what its state.json says."""

    def __init__(self, run_dir: Path, overrides: list[str], cluster: Any, ranks: int) -> None:
        self.run_dir, self.cluster, self.ranks = run_dir, cluster, ranks
        command = [sys.executable, "-m", "efflaunch", *overrides]
        self.process = Process(command, run_dir.parent / "output", dict(cluster.environment))

    def start(self) -> None:
        self.process.start()

    def pid(self, rank: int) -> int:
        return rank_process(self.run_dir, rank)

    def lose_node(self) -> bool:
        used = {os.readlink(f"/proc/{self.pid(rank)}/ns/net") for rank in range(self.ranks)}
        for node in range(1, self.cluster.num_nodes):
            if os.readlink(f"/proc/{self._node_pid(node)}/ns/net") in used:
                self.cluster.crash(node)
                return True
        raise RuntimeError("no rank runs on a node that could be lost")

    def _node_pid(self, node: int) -> int:
        nodes: dict[Any, subprocess.Popen[bytes]] = getattr(self.cluster, "nodes", None) or self.cluster.processes
        return (nodes[node] if node in nodes else nodes[f"node{node}"]).pid

    def stop(self) -> None:
        command = [sys.executable, "-m", "efflaunch", "cancel", str(self.run_dir)]
        subprocess.run(command, check=True, capture_output=True, env=self.process.environment)

    def ended(self) -> float | None:
        from ..launcher.rundir.state import read_state

        state = read_state(self.run_dir)
        return state.ended if state is not None and state.exit_code is not None else None

    def check(self) -> None:
        from ..launcher.rundir.state import read_state

        running = self.process.running
        if running is not None and running.poll() not in (None, 0):
            self.process.check()
        state = read_state(self.run_dir)
        if state is not None and state.exit_code is not None:
            output = "".join(path.read_text()[-4000:] for path in sorted(self.run_dir.glob("*/*.out")))
            raise RuntimeError(f"the run ended with {state.exit_code}:\n{output}")


def rank_process(run_dir: Path, rank: int) -> int:
    """The oldest process that prints to the newest log of the rank, in whichever namespace. LookupError where there is none."""
    import psutil

    logs = sorted(run_dir.glob(f"logs/attempt-*/rank-{rank}.log"), key=lambda path: path.stat().st_mtime)
    candidates = []
    for process in psutil.process_iter():
        try:
            if logs and os.readlink(f"/proc/{process.pid}/fd/1") == str(logs[-1].resolve()):
                candidates.append((process.create_time(), process.pid))
        except (OSError, psutil.Error):
            continue
    if not candidates:
        raise LookupError(f"no process of rank {rank} of {run_dir}")
    return min(candidates)[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One way of starting a run, chosen by `kind`."""

    name: str
    kind: str

    def why_not(self) -> str | None:
        """Return why this contestant cannot be measured here; None where it can."""
        if self.kind in ("bare", "local"):
            return None
        if self.kind not in _backends():
            return f"no launcher={self.kind} in this version"
        if importlib.util.find_spec(f"{__package__}.clusters.{self.kind}") is None:
            return f"no cluster of {self.kind} to start here"
        reason: str | None = self._module().why_not()
        return reason

    def _module(self) -> Any:
        return importlib.import_module(f"{__package__}.clusters.{self.kind}")

    @contextmanager
    def place(self, folder: Path, overrides: list[str], ranks: int) -> Iterator[Place]:
        """Yield a started run for one life; clusters are started before and stopped after it."""
        run_dir = folder / "runs" / "run"
        run_dir.parent.mkdir(parents=True)
        mine = [*overrides, f"run.root={run_dir.parent}", "run.id=run", STEPS]
        if self.kind in ("bare", "local"):
            here = [*mine, f"cluster.ranks_per_node={ranks}"]
            command = [sys.executable, "-m", "efflaunch", *here, "logging.display=quiet"]
            place = Bare(run_dir, here, ranks) if self.kind == "bare" else Foreground(run_dir, command)
            try:
                yield place
            finally:
                place.process.end()
            return
        with self._cluster(folder / "cluster") as cluster:
            spread = [*mine, f"launcher={self.kind}", f"cluster.num_nodes={ranks}", "cluster.ranks_per_node=1"]
            if self.kind == "ray":
                spread += [f"launcher.ray.address={cluster.server}", f"launcher.ray.python={sys.executable}"]
            handed = Handed(run_dir, spread, cluster, ranks)
            try:
                yield handed
            finally:
                handed.process.end()

    def _cluster(self, directory: Path) -> Any:
        module = self._module()
        if self.kind == "slurm":
            return module.SlurmCluster(directory)
        directory.mkdir()
        # Jobs of Ray do not inherit this shell.
        path = os.environ.get("PYTHONPATH")
        return module.RayCluster(directory, variables={"OMP_NUM_THREADS": "1", **({"PYTHONPATH": path} if path else {})})


def _backends() -> list[str]:
    from ..launcher.config.run_config import Backend

    return [backend.value for backend in Backend]


CONTESTANTS = {
    "elastic": Contestant(name="bare torch elastic", kind="bare"),
    "local": Contestant(name="launcher=local", kind="local"),
    "slurm": Contestant(name="launcher=slurm", kind="slurm"),
    "ray": Contestant(name="launcher=ray", kind="ray"),
}

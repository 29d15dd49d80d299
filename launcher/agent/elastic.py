"""torch.distributed.elastic in process: one attempt of all ranks of this node. Imported by agents only.

The one module of launcher/ that imports torch at module level. The torchrun command is not used because it turns
every exit code into 1; here ranks return 0 or 75, and what failed is read from the processes themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from .signals import stop_signals_deferred

LOOPBACK = "127.0.0.1"
_PEERS_GRACE_S = 5.0
"""Seconds the other ranks may take to notice a dead rank and write down their own errors."""


class LoopbackRendezvous(StaticTCPRendezvous):
    """The ranks of one machine meet at a port the kernel chose, which nobody outside the machine can reach.

    Created for each attempt: after a rank was killed, its store may hold half of an exchange.
    """

    def __init__(self, run_id: str, timeout_s: int) -> None:
        self.listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.listener.bind((LOOPBACK, 0))
        super().__init__(LOOPBACK, self.listener.getsockname()[1], 0, 1, run_id, timeout_s)

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            self._store = TCPStore(
                LOOPBACK,
                self.master_port,
                world_size=1,
                is_master=True,
                timeout=self.timeout,
                multi_tenant=True,
                master_listen_fd=self.listener.detach(),
            )
        store = PrefixStore(self.run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self.master_port))


class NodesRendezvous(StaticTCPRendezvous):
    """The ranks of several nodes meet in a store that their agents have open already, under a prefix of the attempt."""

    def __init__(self, store: TCPStore, run_id: str, node: int, num_nodes: int, timeout_s: int) -> None:
        super().__init__(store.host, store.port, node, num_nodes, run_id, timeout_s)
        self._store = store


def open_store(address: str, port: int, *, node: int, num_nodes: int, timeout_s: float) -> TCPStore:
    """The store all agents of a job share: node 0 serves it at exactly this address, the others connect.

    Raises torch's DistError where nobody answers in time, OSError where the address is taken.
    """
    if node:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    return TCPStore(
        address,
        port,
        world_size=num_nodes,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


class OwnLogs(LogsSpecs):
    """Ranks open their own logs and error files, so elastic redirects nothing."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nothing, stderrs=dict(nothing), error_files=dict.fromkeys(envs, os.devnull))

    @property
    def root_log_dir(self) -> str:
        return os.devnull


class RankAgent(LocalElasticAgent):
    """Starts and watches the ranks of one attempt. `processes`: by rank; `killed`: those killed because another had failed."""

    def __init__(self, spec: WorkerSpec, start_method: str, on_start: Callable[[], None], on_poll: Callable[[], None]) -> None:
        super().__init__(spec, OwnLogs(), start_method=start_method)
        self.processes: Mapping[int, BaseProcess] = {}
        self.killed: set[int] = set()
        self._on_start, self._on_poll = on_start, on_poll

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # Held signals reach a rank only once it has its own handlers, and the agent once it knows its ranks.
        with stop_signals_deferred():
            pids = super()._start_workers(worker_group)
            children = {process.pid: process for process in multiprocessing.active_children()}
            self.processes = {worker_group.workers[local].global_rank: children[pid] for local, pid in pids.items() if pid in children}
        self._on_start()
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # Elastic would wait 30 s for the rest; and a rank that ends by itself, even with 0, will never answer.
        self._on_poll()
        if any(process.exitcode is not None for process in self.processes.values()):
            self.end_the_rest()
        return super()._monitor_workers(worker_group)

    def end_the_rest(self) -> None:
        """Kill the ranks that do not end by themselves in the time it takes to notice a lost peer."""
        deadline = time.monotonic() + _PEERS_GRACE_S
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End all ranks that still run, at once."""
        self.killed |= set(self._alive())
        self.send(signal.SIGKILL)

    def _alive(self) -> list[int]:
        return [rank for rank, process in self.processes.items() if process.exitcode is None]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank that still runs."""
        for process in self.processes.values():
            # Not `exitcode`: this is called from signal handlers, in the middle of anything.
            if process.pid is not None:
                _kill(process.pid, number)


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def make_agent(
    entry: Callable[..., int],
    arguments: tuple[Any, ...],
    *,
    num_ranks: int,
    rendezvous: StaticTCPRendezvous,
    start_method: str,
    on_start: Callable[[], None],
    on_poll: Callable[[], None],
) -> RankAgent:
    """An agent that runs `entry(*arguments)` in `num_ranks` processes of this machine, once."""
    spec = WorkerSpec(
        role="rank",
        local_world_size=num_ranks,
        entrypoint=entry,
        args=arguments,
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=rendezvous.master_addr,
        local_addr=rendezvous.master_addr,
    )
    return RankAgent(spec, start_method, on_start, on_poll)

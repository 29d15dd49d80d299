"""A SLURM of several nodes on this machine: every node is a network, host-name, mount and process namespace.

One munged, one slurmctld, one slurmd a node, all from Debian's packages slurm-wlm and munge. Nodes hang on a bridge of
their own, have no route out and no DNS. Processes are stopped by their ids only; a node's end is that of its pid
namespace, as in a power cut.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from . import spaces
from .spaces import TIMEOUT_S, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "unshare", "nsenter", "ip", "ss")

CONF = """\
ClusterName=efflaunch
SlurmctldHost={host}({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
SlurmdSpoolDir={directory}/spool.%n
StateSaveLocation={directory}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
EnforcePartLimits=ANY
ReturnToService=2
JobRequeue=1
MpiDefault=none
KillWait=20
SlurmctldTimeout=60
SlurmdTimeout=6
MessageTimeout=30
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 "
    "ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"
)


def why_not() -> str | None:
    """Return why no cluster can be started here; None where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge iproute2"
    return spaces.why_not()


@dataclass
class SlurmCluster(spaces.Network):
    """Use as a context manager; `environment` is what SLURM's commands need."""

    directory: Path
    num_nodes: int = 3
    private: dict[int, Path] = field(default_factory=dict)
    """Node -> directory of which that node has an empty one of its own."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(200, "eff")
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return {**clean, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def up(self) -> None:
        (self.directory / "state").mkdir(parents=True)
        head = f"{self.net}.1"
        spaces.make_bridge(self.bridge, head)
        with socket.socket() as probe:
            probe.bind((head, 0))
            self.port = probe.getsockname()[1]
        self._write_files(head)
        self._start_munge()
        self._start_controller()
        for node in range(self.num_nodes):
            self.boot(node)
        wait_until(lambda: self.states() == ["idle"] * self.num_nodes, "nodes to become idle")

    def _write_files(self, head: str) -> None:
        names = [f"node{node}" for node in range(self.num_nodes)]
        spaces.write_names(self.directory, {name: self.address(node) for node, name in enumerate(names)})
        nodes = "\n".join(NODE.format(name=name, address=self.address(node), port=self.port + 1) for node, name in enumerate(names))
        text = CONF.format(host=socket.gethostname(), head=head, port=self.port, directory=self.directory, nodes=nodes)
        (self.directory / "slurm.conf").write_text(text)
        for name in names:
            (self.directory / f"spool.{name}").mkdir()

    def _start_munge(self) -> None:
        directory = self.directory
        (directory / "munge.key").write_bytes(secrets.token_bytes(1024))
        (directory / "munge.key").chmod(0o600)
        places = [f"--{what}-file={directory}/munged.{what}" for what in ("pid", "log", "seed")]
        self.spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={directory}/munge.key", f"--socket={directory}/munge.sock", *places
        )
        wait_until((directory / "munge.sock").exists, "munged")

    def _start_controller(self) -> None:
        self.spawn("slurmctld", "slurmctld", "-D", "-i", "-f", f"{self.directory}/slurm.conf")

    def restart_controller(self) -> None:
        """Stop the scheduler and start it again; what it knew is on disk, and jobs run on."""
        self._stop("slurmctld", signal.SIGTERM)
        self._start_controller()
        wait_until(lambda: bool(self.states()), "the scheduler to answer")

    def spawn(self, name: str, *command: str) -> int:
        """Start a daemon in a session of its own; its process id."""
        with (self.directory / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=self.environment, cwd=self.directory
            )
        self.processes[name] = process
        return process.pid

    def boot(self, node: int) -> None:
        """Start a node, for the first time or after a crash."""
        name = f"node{node}"
        space = self.space(node, self.directory, self.private.get(node))
        daemon = ("slurmd", "-D", "-N", name, "-f", f"{self.directory}/slurm.conf")
        self.processes[name] = spaces.start(space, daemon, self.environment)

    def crash(self, node: int) -> None:
        """A power cut: everything on the node is gone at once."""
        process = self.processes.pop(f"node{node}", None)
        if process is not None:
            spaces.kill(process, self.link(node))

    def listening(self, node: int) -> list[str]:
        """Addresses on which Python processes of a node wait for connections."""
        space = f"--net=/proc/{self.processes[f'node{node}'].pid}/ns/net"
        lines = self.run("nsenter", space, "ss", "-H", "-l", "-t", "-n", "-p").splitlines()
        return [line.split()[3].rpartition(":")[0] for line in lines if '"python' in line or '"pt_' in line]

    def states(self) -> list[str]:
        """Return the state of each node by SLURM; empty while SLURM does not answer."""
        command = ("sinfo", "-h", "-N", "-o", "%T")
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S).stdout.split()

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands and return what it printed. AssertionError where it failed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job_state(self, job: int | str) -> str:
        """SLURM's word for the state of a job."""
        line = self.run("scontrol", "show", "job", "-o", str(job))
        return next(word.partition("=")[2] for word in line.split() if word.startswith("JobState="))

    def wait_for(self, job: int | str, *states: str) -> str:
        """Wait until the job is in one of these states, and return which."""
        wait_until(lambda: self.job_state(job) in states, f"job {job} to be {' or '.join(states)}")
        return self.job_state(job)

    def down(self) -> None:
        """Stop everything; nodes die with all that runs on them."""
        for node in range(self.num_nodes):
            self.crash(node)
        for name in ("slurmctld", "munged"):
            self._stop(name, signal.SIGTERM)
        spaces.remove_bridge(self.bridge)

    def _stop(self, name: str, number: signal.Signals) -> None:
        process = self.processes.pop(name, None)
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

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
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TIMEOUT_S = 240.0
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
# The shell is process 1 of the node and reaps what the node leaves behind. Words after it: address, slurmd's command.
NODE_SHELL = """\
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


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if sys.platform != "linux":
        return "a SLURM in namespaces needs Linux"
    if os.geteuid() != 0:
        return "a SLURM in namespaces needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge iproute2"
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


@dataclass
class SlurmCluster:
    """Use as a context manager; `environment` is what SLURM's commands need."""

    directory: Path
    num_nodes: int = 3
    private: dict[int, Path] = field(default_factory=dict)
    """Node -> directory of which that node has an empty one of its own."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Apart from other test sessions on the machine, as far as a process id goes.
        self.net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.bridge = f"eff{os.getpid() % 10**7}"
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return {**clean, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def address(self, node: int) -> str:
        return f"{self.net}.{10 + node}"

    def __enter__(self) -> SlurmCluster:
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def _up(self) -> None:
        (self.directory / "state").mkdir(parents=True)
        head = f"{self.net}.1"
        _sh("ip", "link", "add", self.bridge, "type", "bridge")
        _sh("ip", "addr", "add", f"{head}/24", "dev", self.bridge)
        _sh("ip", "link", "set", self.bridge, "up")
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
        hosts = "".join(f"{self.address(node)} {name}\n" for node, name in enumerate(names))
        (self.directory / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (self.directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
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
        shell = NODE_SHELL.format(name=name, directory=self.directory, address=self.address(node))
        if node in self.private:
            shell = f"mount -t tmpfs tmpfs {self.private[node]}\n{shell}"
        spaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        daemon = ("slurmd", "-D", "-N", name, "-f", f"{self.directory}/slurm.conf")
        pid = self.spawn(name, "unshare", *spaces, "sh", "-c", shell, "sh", *daemon)
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{pid}/ns/net") != own, f"namespaces of {name}")
        link = f"{self.bridge}v{node}"
        _sh("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _sh("ip", "link", "set", link, "master", self.bridge, "up")

    def crash(self, node: int) -> None:
        """A power cut: everything on the node is gone at once."""
        self._stop(f"node{node}", signal.SIGKILL)

    def listening(self, node: int) -> list[str]:
        """Addresses on which Python processes of a node wait for connections."""
        space = f"--net=/proc/{self.processes[f'node{node}'].pid}/ns/net"
        lines = self.run("nsenter", space, "ss", "-H", "-l", "-t", "-n", "-p").splitlines()
        return [line.split()[3].rpartition(":")[0] for line in lines if '"python' in line or '"pt_' in line]

    def states(self) -> list[str]:
        """What SLURM says of each node; nothing while it does not answer."""
        command = ("sinfo", "-h", "-N", "-o", "%T")
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S).stdout.split()

    def run(self, *command: str) -> str:
        """One of SLURM's commands; what it printed. AssertionError where it failed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job_state(self, job: int | str) -> str:
        """SLURM's word for the state of a job."""
        line = self.run("scontrol", "show", "job", "-o", str(job))
        return next(word.partition("=")[2] for word in line.split() if word.startswith("JobState="))

    def wait_for(self, job: int | str, *states: str) -> str:
        """Until the job is in one of these states."""
        wait_until(lambda: self.job_state(job) in states, f"job {job} to be {' or '.join(states)}")
        return self.job_state(job)

    def down(self) -> None:
        """Stop everything; nodes die with all that runs on them."""
        for node in range(self.num_nodes):
            self._stop(f"node{node}", signal.SIGKILL)
        for name in ("slurmctld", "munged"):
            self._stop(name, signal.SIGTERM)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

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


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)

"""Ray on the nodes of a SLURM job: `python -m efflaunch.launcher.ray.on_slurm head|node|wait`, as slurm/ray.sbatch calls it.

head: print where Ray's head is to be, ADDRESS:PORT; on the first node.
node HEAD: Ray on this node, until SIGUSR1, SIGTERM or the job's end; the head itself where HEAD is an address of this node.
wait HEAD N: until N nodes have joined.

`ray start --block` is a child, told to end by its process id: `ray stop` would end every Ray it can see.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ...errors import EXIT_DONE, EXIT_RETRY, EfflaunchError
from ..env import agent_variables, cpus_of_step, ray_quiet_variables, slurm_place
from ..nodes.address import address_towards, head_address, head_port
from .cluster import NO_CLOUD

_JOIN_S, _LOOK_S = 300.0, 1.0


def main(arguments: list[str]) -> int:
    """Run one of the three; the return value is the exit code."""
    what, *rest = arguments
    try:
        if what == "head":
            place = slurm_place()
            address = head_address(place.name, rest[0] if rest else None, "the interface given to on_slurm head")
            print(f"{address}:{head_port(place.job, address)}")
            return EXIT_DONE
        if what == "wait":
            return _wait(rest[0], int(rest[1]))
        return _node(rest[0], rest[1:])
    except EfflaunchError as error:
        print(f"efflaunch: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def ray_command(head: str, own: str, cpus: int, temp_dir: Path, more: Sequence[str] = ()) -> list[str]:
    """`ray start` for a node whose address is `own`. Pure."""
    address, _, port = head.rpartition(":")
    same = ["--block", f"--node-ip-address={own}", f"--num-cpus={cpus}", f"--temp-dir={temp_dir}", "--disable-usage-stats", *more]
    # The job server is for this job's own nodes: efflaunch runs its driver on the head.
    role = ["--head", f"--port={port}", f"--dashboard-host={address}"] if own == address else [f"--address={head}"]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", *same, *role]


def _node(head: str, more: Sequence[str]) -> int:
    own = address_towards(head.rpartition(":")[0])
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        # Paths of Ray's sockets must be short, and it asks the clouds' metadata servers unless its home says otherwise.
        home = Path(directory)
        (home / "ray_bootstrap_config.yaml").write_text(NO_CLOUD)
        command = ray_command(head, own, cpus_of_step(), home / "t", more)
        process = subprocess.Popen(command, env={**_variables(), "HOME": directory})

        def stop(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGTERM)

        # SIGTERM would have SLURM end the whole step by force, after a while.
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        process.wait()
    return EXIT_DONE


def _variables() -> dict[str, str]:
    return agent_variables(with_secrets=True) | ray_quiet_variables()


def _wait(head: str, num_nodes: int) -> int:
    import ray

    deadline = time.monotonic() + _JOIN_S
    seen = "no head"
    while time.monotonic() < deadline:
        try:
            ray.init(address=head, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            seen = str(error).splitlines()[0]
            time.sleep(_LOOK_S)
            continue
        alive = [node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]]
        if len(alive) >= num_nodes:
            ray.shutdown()
            return EXIT_DONE
        seen = f"{len(alive)} of {num_nodes} nodes: {', '.join(sorted(alive))}"
        ray.shutdown()
        time.sleep(_LOOK_S)
    print(f"efflaunch: Ray at {head} did not come up within {_JOIN_S:g} s: {seen}", file=sys.stderr, flush=True)
    return EXIT_RETRY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

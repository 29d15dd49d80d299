"""A training function for tests of the launcher: real gloo ranks that add numbers, write metrics and save a number.

What goes wrong is read from FAKE_TRAINING, a list of `what:rank:step` separated by commas; each happens once, unless it
ends in `!`. `hold` waits for the file `released` in the run directory: what a test does meanwhile happens at that step.
`FAKE_STEP_S` is the length of a step. FAKE_CLOCK=rest: hangs are timed by rest.RestClock. FAKE_IMPORT: a file; an agent that
imports this module makes it, and has imported the module once it was told to stop.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from efflaunch.errors import EXIT_DONE, EXIT_PREEMPTED, DataError
from efflaunch.launcher.agent.signals import StopFlag
from efflaunch.launcher.config.run_config import Config
from efflaunch.tests.launcher import rest
from efflaunch.tests.limits import ENDS_S
from efflaunch.utils.heartbeat import Heartbeat

PRELOAD = ("torch.distributed",)


def train(config: Config, run_dir: Path, stop: StopFlag, pulse: Heartbeat) -> int:
    """Count to config.train.steps, saving every config.checkpoint.every_steps."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    write_pid(run_dir, rank)
    dist.init_process_group("gloo", timeout=timedelta(seconds=ENDS_S))
    first = _newest_checkpoint(run_dir)
    if rank == 0:
        _write(
            run_dir,
            event="start",
            step=first + 1,
            steps=config.train.steps,
            world_size=world_size,
            parameters=10,
            resumed_from=first or None,
        )
    for step in range(first + 1, config.train.steps + 1):
        pulse.begin_step(step - 1, expected_s=0.02)
        go_wrong(run_dir, rank, step)
        stopped = one_step(run_dir, rank, step, stop)
        pulse.at("saving")
        if stopped or step % (config.checkpoint.every_steps or 10**9) == 0 or step == config.train.steps:
            go_wrong(run_dir, rank, "save")
            _save(run_dir, rank, step)
        if stopped:
            return EXIT_PREEMPTED
    return EXIT_DONE


def one_step(run_dir: Path, rank: int, step: int, stop: StopFlag) -> bool:
    """Sleep, add up the ranks, agree on stopping."""
    time.sleep(float(os.environ.get("FAKE_STEP_S", "0.02")))
    total = torch.tensor([1.0, float(stop.requested)])
    dist.all_reduce(total)
    if rank == 0:
        ranks = [{"rank": other, "tokens": 8, "peak_bytes": 1 << 20} for other in range(dist.get_world_size())]
        numbers = {"tokens": 16, "tokens_per_s": 100.0, "step_s": 0.02, "micro_batches": 1, "sequences": 2, "total_tokens": 16 * step}
        _write(run_dir, event="step", step=step, loss=10.0 / step, grad_norm=1.0, lr=1e-3, plan="[0+2: 2 seq]", ranks=ranks, **numbers)
    return total[1].item() > 0


def write_pid(run_dir: Path, rank: int) -> None:
    """Leave the rank's process id for the test to find."""
    (run_dir / f"rank-{rank}.pid").write_text(str(os.getpid()))


def go_wrong(run_dir: Path, rank: int, step: int | str) -> None:
    """Do what FAKE_TRAINING asks of this rank at this step."""
    for what, is_once in _mishaps(rank, step):
        marker = run_dir / f"happened-{what}-{rank}-{step}"
        if is_once and marker.exists():
            continue
        marker.touch()
        if what == "hold":
            wait_for(run_dir / "released")
        else:
            _ACTIONS[what]()


def wait_for(file: Path) -> None:
    """Until it is there."""
    while not file.exists():
        time.sleep(0.01)


def _mishaps(rank: int, step: int | str) -> Iterator[tuple[str, bool]]:
    for item in filter(None, os.environ.get("FAKE_TRAINING", "").split(",")):
        what, who, when = item.rstrip("!").split(":")
        if int(who) == rank and when == str(step):
            yield what, not item.endswith("!")


def _raise() -> None:
    raise RuntimeError("the wheels came off")


def _raise_user_error() -> None:
    raise DataError("document 17", found="nothing", expected="tokens", hint="another corpus")


def _hang() -> None:
    # As a stuck kernel: deaf to everything but SIGKILL.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(600)


def _block() -> None:
    # As a lock nobody gives back.
    time.sleep(600)


_ACTIONS = {
    "block": _block,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "user": _raise_user_error,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(0),
    "hang": _hang,
}


def _save(run_dir: Path, rank: int, step: int) -> None:
    dist.barrier()
    if rank == 0:
        directory = run_dir / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "COMMIT").write_text("{}")
        _write(run_dir, event="checkpoint", step=step, path=f"checkpoints/step-{step:08d}", save_s=0.01)
    dist.barrier()


def _newest_checkpoint(run_dir: Path) -> int:
    return max((int(path.parent.name[5:]) for path in (run_dir / "checkpoints").glob("step-*/COMMIT")), default=0)


def _write(run_dir: Path, **event: Any) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **event}) + "\n")


if os.environ.get("FAKE_CLOCK") == "rest":
    # A rank deaf to everything is not waited for: it writes no stacks, and which ones do is not looked at then.
    rest.install(answer_s=5.0 if "hang:" in os.environ.get("FAKE_TRAINING", "") else 120.0)
_agent = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
if _agent is not None and os.environ.get("FAKE_IMPORT"):
    Path(os.environ["FAKE_IMPORT"]).touch()
    while not _agent.stopping:
        time.sleep(0.01)

"""What can be done follows from what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.doctor import examination
from efflaunch.launcher.doctor.examination import examine, works
from efflaunch.launcher.doctor.finding import Finding, State
from efflaunch.launcher.doctor.torch_probe import SeenGpu, TorchFacts
from efflaunch.launcher.slurm import control

GPU = SeenGpu(name="NVIDIA H200", capability="9.0", total_bytes=150_000_000_000, free_bytes=150_000_000_000)
CPU = TorchFacts(version="2.13.0+cpu", cuda=None, nccl=None, backends=["gloo"], transformers="5.23.0", gpus=[])
CUDA = TorchFacts(version="2.13.0", cuda="13.0", nccl="2.27.3", backends=["gloo", "nccl"], transformers="5.23.0", gpus=[GPU])


def finding(name: str, state: State, topic: str = "software") -> Finding:
    return Finding(topic=topic, name=name, state=state, found="as it is")


def can(findings: list[Finding], torch: TorchFacts | str) -> set[str]:
    return {work.name for work in works(findings, torch) if work.can_be_done}


def test_what_follows() -> None:
    found = [
        finding("C++ compiler", State.OK),
        finding("SLURM", State.NOTE),
        finding("extra ray", State.OK),
        finding("extra wandb", State.NOTE),
    ]
    here = {
        "plan, simulate, explain (no torch needed)",
        "train on processors (cluster=local_cpu)",
        "memory.compile on processors",
        "launcher=ray",
    }
    assert can(found, CPU) == here
    assert can(found, CUDA) == here | {"train on GPUs (cluster.device=cuda)"}


def test_without_torch_plans_remain() -> None:
    assert can([finding("torch", State.BROKEN)], "ModuleNotFoundError: No module named 'torch'") == {
        "plan, simulate, explain (no torch needed)"
    }
    assert can([finding("numpy", State.BROKEN)], CPU) == set()


def test_a_directory_that_cannot_be_written_trains_nothing() -> None:
    assert can([finding("writing", State.BROKEN, "storage")], CUDA) == {"plan, simulate, explain (no torch needed)"}


@pytest.mark.parametrize("has_slurm", [False, True])
def test_everything_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_slurm: bool) -> None:
    """SLURM's commands without a controller are a warning: the machine may do without."""

    def fail() -> str:
        raise ConfigError("SLURM", found="slurmctld is DOWN", expected="a controller that is up", hint="ask the site")

    monkeypatch.setattr(examination, "ask_torch", lambda: CPU)
    monkeypatch.setattr(examination, "all_gpus", list)
    monkeypatch.setattr(control, "has_slurm", lambda: has_slurm)
    monkeypatch.setattr(control, "controller_words", fail)
    said: list[str] = []
    examined = examine(tmp_path, num_bytes=0, on_progress=said.append)
    topics = list(dict.fromkeys(each.topic for each in examined.findings))
    assert topics == ["software", "machine", "schedulers", "storage"] and len(said) == 4
    assert len({each.name for each in examined.findings}) == len(examined.findings)
    (slurm,) = (each for each in examined.findings if each.name == "SLURM")
    assert slurm.state is (State.WARNING if has_slurm else State.NOTE) and examined.is_fit

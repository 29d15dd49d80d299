"""Limits of processes, the kernel's clock, GPUs as the driver and torch see them."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.launcher.doctor import host as looked
from efflaunch.launcher.doctor.finding import Finding, State
from efflaunch.launcher.doctor.host import clock_status, gpus, host
from efflaunch.launcher.doctor.torch_probe import SeenGpu, TorchFacts
from efflaunch.launcher.hardware import Machine
from efflaunch.launcher.visible_gpus import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", 85_520_809_984)
SEEN = SeenGpu(name=H100.name, capability="9.0", total_bytes=85_000_000_000, free_bytes=84_000_000_000)
CUDA = TorchFacts(version="2.13.0", cuda="13.0", nccl="2.27.3", backends=["gloo", "nccl"], transformers="5.23.0", gpus=[SEEN])
MACHINE = Machine((), 2, 16 << 30)


def by_name(machine: Machine) -> dict[str, Finding]:
    return {each.name: each for each in host(machine)}


def test_this_machine() -> None:
    found = by_name(MACHINE)
    names = ["cores", "host memory", "open files", "locked memory", "/dev/shm", "clock", "network", "C++ compiler"]
    assert list(found) == names and all(each.topic == "machine" and each.found for each in found.values())
    assert found["host memory"].found.startswith("16.0 GiB free of ")


def test_little_memory_and_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, resource.RLIM_INFINITY))
    found = by_name(Machine((), 1, 1 << 30))
    assert found["host memory"].state is State.WARNING
    assert (found["open files"].state, found["open files"].hint) == (State.WARNING, "ulimit -n 4096")
    assert found["open files"].found == "at most 1,024 a process (hard limit any number)"


def test_locked_memory_matters_where_cards_register_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8 << 20, 8 << 20))
    assert by_name(MACHINE)["locked memory"].state is State.OK
    monkeypatch.setattr(looked, "_infiniband", lambda: ["mlx5_0"])
    found = by_name(MACHINE)
    assert found["locked memory"].state is State.WARNING and found["network"].found.endswith("InfiniBand or RoCE: mlx5_0")


def test_a_small_dev_shm_matters_with_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(looked, "LEAST_SHARED", 1 << 60)
    assert by_name(MACHINE)["/dev/shm"].state is State.OK
    assert by_name(replace(MACHINE, gpus=(H100,)))["/dev/shm"].hint == "docker run --shm-size=8g, or --ipc=host"


@pytest.mark.parametrize(("status", "state"), [(None, State.NOTE), (0x2041, State.NOTE), (0x2001, State.OK)])
def test_the_clock(monkeypatch: pytest.MonkeyPatch, status: int | None, state: State) -> None:
    monkeypatch.setattr(looked, "clock_status", lambda: status)
    assert by_name(MACHINE)["clock"].state is state


def test_the_kernel_answers() -> None:
    status = clock_status()
    assert status is None or 0 <= status < 1 << 16, "a word of flags"


def test_gpus_that_torch_can_use() -> None:
    busy = replace(SEEN, free_bytes=10_000_000_000)
    first, second = gpus([H100, H100], replace(CUDA, gpus=[SEEN, busy]))
    assert (first.name, first.state) == ("GPU 0", State.OK) and "compute 9.0, 78.2 GiB free of 79.2 GiB" in first.found
    assert second.state is State.WARNING and second.hint == "another process is on it: nvidia-smi names it"


@pytest.mark.parametrize(
    ("torch", "hidden", "words"),
    [
        (replace(CUDA, gpus=[], problem="CUDA driver version is insufficient"), None, "CUDA driver version is insufficient"),
        (replace(CUDA, gpus=[], cuda=None, nccl=None), None, "1, and torch was built without CUDA"),
        (replace(CUDA, gpus=[]), None, "1 by the driver, and torch's CUDA 13.0 sees none of them"),
        (replace(CUDA, gpus=[], problem="No CUDA GPUs are available"), "", "1 by the driver, and CUDA_VISIBLE_DEVICES= hides them"),
    ],
)
def test_gpus_that_it_cannot_use(monkeypatch: pytest.MonkeyPatch, torch: TorchFacts, hidden: str | None, words: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (finding,) = gpus([H100], torch)
    assert finding.state is State.BROKEN and finding.found == words and finding.hint


def test_no_gpu_is_no_fault() -> None:
    """A build with CUDA says so as well where there is no driver, as on a login node."""
    for problem in ("", "Found no NVIDIA driver on your system."):
        (finding,) = gpus([], replace(CUDA, gpus=[], problem=problem))
        assert finding.state is State.NOTE
    assert gpus([], "torch does not import") == []

"""What this machine is found to have, from stubs of what its driver answers."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.hardware import Machine, find_gpus
from efflaunch.launcher.machine_checks import MachineError, check_free, check_node
from efflaunch.launcher.visible_gpus import Gpu

GIB = 1 << 30
CARD = ("NVIDIA H100 80GB HBM3", 80 * GIB)


class Unsupported(Exception):
    """NVML's answer to a question that a device does not know."""


class Driver:
    """A stub of NVML's package: cards with the bytes that other processes left free, and slices of those in MIG mode."""

    NVMLError = Unsupported

    def __init__(self, free: list[int], slices: dict[int, int] | None = None) -> None:
        self._free, self._slices = free, slices or {}

    def nvmlInit(self) -> None:
        """Nothing to do."""

    def nvmlDeviceGetCount(self) -> int:
        return len(self._free)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[int, int | None]:
        return index, None

    def nvmlDeviceGetMemoryInfo(self, handle: tuple[int, int | None]) -> Any:
        card, part = handle
        return SimpleNamespace(total=CARD[1] if part is None else 10 * GIB, free=self._free[card] if part is None else 9 * GIB)

    def nvmlDeviceGetName(self, handle: tuple[int, int | None]) -> bytes:
        return CARD[0].encode()

    def nvmlDeviceGetUUID(self, handle: tuple[int, int | None]) -> str:
        card, part = handle
        return f"GPU-{card}a" if part is None else f"MIG-{card}a-{part}"

    def nvmlDeviceGetMigMode(self, handle: tuple[int, int | None]) -> list[int]:
        if handle[1] is not None:
            raise Unsupported
        return [int(handle[0] in self._slices), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: tuple[int, int | None]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: tuple[int, int | None], index: int) -> tuple[int, int]:
        if index >= self._slices[handle[0]]:
            raise Unsupported
        return handle[0], index


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_only_what_the_variable_leaves_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver([80 * GIB, 3 * GIB, 80 * GIB]))
    assert [gpu.uuid for gpu in find_gpus()] == ["GPU-0a", "GPU-1a", "GPU-2a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-0a")
    assert find_gpus() == [Gpu(*CARD, 80 * GIB, "GPU-2a"), Gpu(*CARD, 80 * GIB, "GPU-0a")]


def test_processes_of_others_count_where_they_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cards, one in use: four visible ones are free or not by whether it is among them."""
    monkeypatch.setitem(sys.modules, "pynvml", Driver([80 * GIB] * 7 + [3 * GIB]))
    config = compose(["+experiment=llama8b_1M", "cluster.ranks_per_node=4", "parallel.tokens_per_rank=256K"])
    for visible, is_free in (("0,1,2,3", True), ("4,5,6,7", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        machine = Machine(tuple(find_gpus()), 64, 1000 * GIB)
        check_node(config, machine)
        if is_free:
            check_free(config, machine)
        else:
            with pytest.raises(MachineError, match=r"3 free; one of the others has 3\.0 GiB left"):
                check_free(config, machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(MachineError, match=r"needs 4 GPUs with 79\.1 GiB, found 2 with 80 GiB"):
        check_node(config, Machine(tuple(find_gpus()), 64, 1000 * GIB))


def test_a_slice_is_no_whole_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver([80 * GIB, 80 * GIB], {0: 2}))
    assert find_gpus() == [Gpu(CARD[0], 10 * GIB, 9 * GIB, "MIG-0a-0")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0a-1")
    assert find_gpus() == [Gpu(CARD[0], 10 * GIB, 9 * GIB, "MIG-0a-1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_gpus() == [Gpu(*CARD, 80 * GIB, "GPU-1a")]


def test_a_card_that_tells_no_memory_has_none_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Driver):
        def nvmlDeviceGetMemoryInfo(self, handle: tuple[int, int | None]) -> Any:
            raise Unsupported

    monkeypatch.setitem(sys.modules, "pynvml", Silent([0]))
    assert find_gpus() == [Gpu(CARD[0], 0, None, "GPU-0a")]
    config = compose(["+experiment=llama8b_1M", "cluster.ranks_per_node=4", "parallel.tokens_per_rank=256K"])
    machine = Machine(tuple(find_gpus()), 64, 1000 * GIB)
    with pytest.raises(MachineError, match=r"4 with nothing on them, found 1 free\."):
        check_free(config, machine)
    with pytest.raises(MachineError, match=r"needs 4 GPUs with 79\.1 GiB, found 1 with 0 GiB"):
        check_node(config, machine)


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Puts an nvidia-smi that prints `text` in front of PATH, and NVML's package out of reach."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_words_in_place_of_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "GB10, [N/A], [N/A], GPU-0a, [N/A]\nH100, 81559, [Insufficient Permissions], GPU-1a, Disabled")
    assert find_gpus() == [Gpu("GB10", 0, None, "GPU-0a"), Gpu("H100", 81559 << 20, None, "GPU-1a")]


def test_the_same_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    rows = "\n".join(f"NVIDIA H100 80GB HBM3, 81559, 80000, GPU-{index}a, {mode}" for index, mode in enumerate(["[N/A]", "Enabled"]))
    listed = "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1a)\n  MIG 1g.10gb     Device  0: (UUID: MIG-5c)\n"
    tool.write_text(f"#!/bin/sh\nif [ \"$1\" = -L ]; then printf '%s' '{listed}'; else echo '{rows}'; fi\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert find_gpus() == [Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 80000 << 20, "GPU-0a")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c")
    assert find_gpus() == [Gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * GIB, uuid="MIG-5c")]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert find_gpus() == []

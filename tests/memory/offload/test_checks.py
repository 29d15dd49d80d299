"""Memory and disk are asked for before anything is taken; rates are copies over time."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path

import psutil
import pytest
import torch

from efflaunch.errors import ConfigError
from efflaunch.memory.offload import checks
from efflaunch.memory.offload.checks import FreeMemory, check_host_memory, check_offload_dir, check_offload_space, free_memory
from efflaunch.memory.offload.device import Past
from efflaunch.memory.offload.measure_bandwidth import ROUNDS, measure_directory, measure_host_link, rate_of
from efflaunch.memory.offload.staging import staging_bytes_for

GIB = 1 << 30


def test_enough_memory_for_all_ranks() -> None:
    check_host_memory(2 * GIB, 4, FreeMemory(8 * GIB, "available on the machine"))
    check_host_memory(0, 8)  # of the real machine
    with pytest.raises(ConfigError) as caught:
        check_host_memory(2 * GIB, 4, FreeMemory(8 * GIB - 1, "available on the machine"))
    assert str(caught.value) == (
        "memory.host_budget: found 8.0 GiB of host memory free on this node (available on the machine); expected 8.0 GiB for what 4 ranks "
        "move there, 2.0 GiB each.\n  Try: memory.host_budget=8191MiB, memory.segment_layers=2, or memory.offload_dir=DIRECTORY on a "
        "local disk; under Slurm, more --mem"
    )


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def proc(folder: Path, text: str) -> Path:
    group(folder / "proc", {"cgroup": text})
    return folder / "proc"


def test_a_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    """v2: the job's group has no limit, the one above it has; page cache can be dropped."""
    groups = tmp_path / "cgroup"
    group(groups / "jobs" / "one", {"memory.max": "max", "memory.current": "5000", "memory.stat": "anon 10\ninactive_file 4000"})
    group(groups / "jobs", {"memory.max": "10000", "memory.current": "7000", "memory.stat": "anon 10\ninactive_file 4000"})
    assert free_memory(proc(tmp_path, "0::/jobs/one"), groups) == FreeMemory(7000, f"limit of the control group {groups}/jobs")


def test_version_1(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    limits = {"memory.limit_in_bytes": "9000", "memory.usage_in_bytes": "8000", "memory.stat": "inactive_file 1\ntotal_inactive_file 500"}
    group(groups / "memory" / "slurm", limits)
    group(groups / "memory", {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "1"})
    free = free_memory(proc(tmp_path, "5:cpu,cpuacct:/slurm\n4:memory:/slurm\n1:name=systemd:/x"), groups)
    assert free == FreeMemory(1500, f"limit of the control group {groups}/memory/slurm")


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    group(groups, {"memory.max": "4096", "memory.current": "5000"})
    free = free_memory(proc(tmp_path, "0::/kubepods/pod1"), groups)
    assert free == FreeMemory(0, f"limit of the control group {groups}")


def test_without_limits_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1234))
    assert free_memory(tmp_path, tmp_path) == FreeMemory(1234, "available on the machine")
    assert free_memory().num_bytes <= 1234, "on this machine, whatever its groups say"


def test_offload_directories(tmp_path: Path) -> None:
    check_offload_dir(str(tmp_path), 1000, 4)
    with pytest.raises(ConfigError, match="found no such file or directory"):
        check_offload_dir(str(tmp_path / "none"), 1, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="found a file, not a directory"):
        check_offload_dir(str(tmp_path / "file"), 1, 1)
    with pytest.raises(ConfigError) as caught:
        check_offload_dir(str(tmp_path), 1 << 48, 4)
    assert "free; expected 1024.0 TiB for what is moved there" in str(caught.value)
    assert f"memory.offload_dir={tmp_path}" in str(caught.value) and "on a larger disk" in str(caught.value)


def test_files_need_disk_and_a_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda: FreeMemory(GIB, "available on the machine"))
    check_offload_space(GIB // 2, 2, None)
    check_offload_space(1 << 20, 2, str(tmp_path))
    with pytest.raises(ConfigError, match="of host memory free on this node"):
        check_offload_space(GIB // 2 + 1, 2, None)
    with pytest.raises(ConfigError, match="on a larger disk"):
        check_offload_space(1 << 48, 2, str(tmp_path))
    with pytest.raises(ConfigError, match="expected 1.5 GiB for what 3 ranks move there, 512.0 MiB each"):
        check_offload_space(1 << 30, 3, str(tmp_path))


def test_staging_memory_is_no_more_than_what_moves() -> None:
    assert [staging_bytes_for(num_bytes) >> 20 for num_bytes in (1, 40 << 20, 1 << 30)] == [32, 48, 512]


def test_directories_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="found permission denied; expected a directory on a local disk"):
        check_offload_dir(str(tmp_path), 1, 1)


def test_a_rate_is_bytes_over_time() -> None:
    """Two copies under way at a time, each 0.5 s after the one before."""
    now, started = [0.0], []

    class Copy(Past):
        def synchronize(self) -> None:
            now[0] += 0.5

    def start(buffer: int) -> Past:
        started.append(buffer)
        return Copy()

    assert rate_of(start, 100, 2.0, clock=lambda: now[0]) == 4 * 100 / 2.0
    assert started == [0, 1, 0, 1, 0, 1, 0], "buffers take turns"


def test_links_of_this_machine(tmp_path: Path) -> None:
    """The ranks of a node meet before every round: each direction and both, in turns, as often as there are rounds."""
    met: list[str] = []
    link = measure_host_link(torch.device("cpu"), 0.01, copy_bytes=1 << 16, together=lambda: met.append("link"))
    disk = measure_directory(str(tmp_path), 0.01, file_bytes=1 << 20, copy_bytes=1 << 16, together=lambda: met.append("disk"))
    for free in (link, disk):
        assert all(math.isfinite(rate) and rate > 0 for rate in astuple(free))
    assert met.count("link") == 3 * ROUNDS and met.count("disk") == 4
    assert not list(tmp_path.iterdir()), "the file has no name"

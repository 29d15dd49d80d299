"""CUDA_VISIBLE_DEVICES and MIG, by CUDA's own rules: what a process sees of a machine's GPUs."""

from __future__ import annotations

import pytest

from efflaunch.launcher.visible_gpus import Gpu, parse_list, visible_gpus

GIB = 1 << 30
WHOLE = tuple(Gpu("H100", 80 * GIB, uuid=f"GPU-{index}a7-00") for index in range(4))
SLICES = tuple(Gpu("H100 MIG 3g.40gb", 40 * GIB, uuid=f"MIG-{index}c-11") for index in range(2))
CUT = Gpu("H100", 80 * GIB, uuid="GPU-9f-00", slices=SLICES, in_mig_mode=True)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,9,1", [0]),
        ("1,-1,2", [1]),
        ("0,0", []),
        ("GPU-3a7-00,1", [3, 1]),
        ("GPU-2", [2]),
        ("GPU-", []),
        ("0,GPU-nobody,1", [0]),
        ("2,GPU-2a7", []),
    ],
)
def test_entries_by_index_and_uuid(variable: str | None, expected: list[int]) -> None:
    """In their order, up to the first that names no GPU or more than one; a GPU twice makes none visible."""
    assert visible_gpus(WHOLE, variable) == [WHOLE[index] for index in expected]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, SLICES[:1]),
        ("0", SLICES[:1]),
        ("MIG-1c-11", SLICES[1:]),
        ("MIG-1c-11,MIG-0c-11", SLICES[1:]),
        ("GPU-9f", SLICES[:1]),
        ("1", WHOLE[:1]),
    ],
)
def test_a_slice_stands_for_its_gpu_and_is_seen_alone(variable: str | None, expected: tuple[Gpu, ...]) -> None:
    assert visible_gpus((CUT, *WHOLE), variable) == list(expected)
    empty = Gpu("H100", 80 * GIB, uuid="GPU-8f-00", in_mig_mode=True)
    assert visible_gpus((empty,), variable) == []


def test_slices_are_read_from_nvidia_smis_list() -> None:
    text = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-9f-00)\n"
        "  MIG 3g.40gb     Device  0: (UUID: MIG-0c-11)\n"
        "  MIG 1g.10gb+me  Device  1: (UUID: MIG-1c-11)\n"
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-8f-00)\n"
    )
    name = "NVIDIA H100 80GB HBM3 MIG"
    first, second = Gpu(f"{name} 3g.40gb", 40 * GIB, uuid="MIG-0c-11"), Gpu(f"{name} 1g.10gb+me", 10 * GIB, uuid="MIG-1c-11")
    assert parse_list(text) == {"GPU-9f-00": (first, second)}
    assert parse_list("No devices found.\n") == {}

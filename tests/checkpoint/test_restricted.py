"""Files of other programs: tensors come back, no class of theirs is run, and a flipped bit is found."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from efflaunch.checkpoint import restricted
from efflaunch.checkpoint.restricted import Fields, Ignored, load
from efflaunch.errors import CheckpointError


class Theirs:
    """A class of another program."""

    def __init__(self) -> None:
        self.start = 3


class Harmful:
    """Its pickle runs a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch harmed",)


class Removing:
    """Its pickle removes a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return shutil.rmtree, (self.path,)


NAME = f"{Theirs.__module__}.Theirs"


def test_tensors_come_back_and_known_objects_are_stood_for(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(5), "y": [Theirs(), {"z": torch.Size([2])}]}, tmp_path / "a.pt")
    counts: list[int] = []
    content = load(tmp_path / "a.pt", {NAME: Fields}, counts.append)
    assert torch.equal(content["x"], torch.arange(5)) and content["y"][0].start == 3 and content["y"][1]["z"] == torch.Size([2])
    assert sum(counts) >= 40 and vars(load(tmp_path / "a.pt", {NAME: Ignored})["y"][0]) == {}


@pytest.mark.parametrize(("value", "named"), [(Theirs(), "Theirs"), (Harmful(), "system")])
def test_no_class_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": value}, "a.pt")
    with pytest.raises(CheckpointError) as error:
        load(Path("a.pt"), {})
    assert named in error.value.found and not Path("harmed").exists()


def test_a_stand_in_runs_nothing_either(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    torch.save({"x": Removing(str(victim))}, tmp_path / "a.pt")
    content = load(tmp_path / "a.pt", {"shutil.rmtree": Ignored})
    assert isinstance(content["x"], Ignored) and victim.is_dir()


@pytest.mark.parametrize("damage", ["flipped", "cut", "text", "list", "nothing"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.pt"
    numbers = torch.arange(4000.0)
    torch.save([numbers] if damage == "list" else {"x": numbers}, path)
    data = bytearray(path.read_bytes())
    where = data.index(numbers[1000:1010].numpy().tobytes())
    data[where] ^= 1
    changed = {"flipped": bytes(data), "cut": bytes(data[:9000]), "text": b"hello"}
    if damage == "nothing":
        path.unlink()
    else:
        path.write_bytes(changed.get(damage, path.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        load(path, {})
    words = {"flipped": "Bad CRC-32", "cut": "not a zip", "text": "not a zip", "list": "a list", "nothing": "no such file"}
    assert error.value.where == str(path) and words[damage] in error.value.found


def test_compressed_records_and_endless_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are mapped as they lie in the file, and what is no tensor is read whole: a small file could hold any number of bytes."""
    path, packed = tmp_path / "a.pt", tmp_path / "packed.pt"
    torch.save({"x": torch.zeros(4000)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for record in archive.infolist():
            other.writestr(record.filename, archive.read(record))
    with pytest.raises(CheckpointError, match="the compressed record"):
        load(packed, {})
    assert load(path, {})["x"].numel() == 4000
    monkeypatch.setattr(restricted, "LARGEST_PICKLE", 8)
    with pytest.raises(CheckpointError, match=r"bytes in .*data\.pkl, with at most 8 expected"):
        load(path, {})

"""`efflaunch import`: what is written is said, as text and as JSON; what is wrong ends with 93."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from efflaunch.launcher import cli
from efflaunch.tests.model.zero_files import write_zero
from efflaunch.tests.parity.reference import reference_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json, as Hugging Face's trainer leaves it, and a ZeRO checkpoint in it."""
    folder, model = tmp_path_factory.mktemp("checkpoint-1"), reference_model("llama", torch.float32)
    model.config.save_pretrained(folder)
    write_zero(folder / "global_step1", {name: parameter.detach() for name, parameter in model.named_parameters()})
    (folder / "latest").write_text("global_step1")
    return folder


def test_a_checkpoint_becomes_a_directory(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "76,224 weights in float32" in said.out and "ZeRO stage 3 of 2 ranks" in said.out and "100 % of reading" in said.err
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "out" / "config.json").is_file()
    assert cli.main(["import", str(checkpoint), "--out", str(tmp_path / "narrow"), "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_bytes"] == 2 * report["num_parameters"] == 2 * 76_224 and report["model"] == str(checkpoint)


def test_what_is_wrong_ends_with_93(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert cli.main(["import", str(checkpoint), "--out", str(tmp_path / "full")]) == 93
    assert cli.main(["import", str(tmp_path), "--out", str(tmp_path / "out")]) == 93
    assert "a directory with files in it" in (said := capsys.readouterr().err) and "no config.json" in said
    assert not (tmp_path / "out").exists()

"""`efflaunch doctor`: a page and JSON, 0 where nothing is broken, 93 where something is, or where there is no such directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.launcher.cli import main
from efflaunch.launcher.doctor import examination
from efflaunch.launcher.doctor.torch_probe import TorchFacts

CPU = TorchFacts(version="2.13.0+cpu", cuda=None, nccl=None, backends=["gloo"], transformers="5.23.0", gpus=[])


@pytest.fixture
def torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, whatever this one has."""
    monkeypatch.setattr(examination, "ask_torch", lambda: CPU)
    monkeypatch.setattr(examination, "all_gpus", list)


@pytest.mark.usefixtures("torch_answers")
def test_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", str(tmp_path), "--storage-mib", "1"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert code == 0, out
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "software",
        "machine",
        "schedulers",
        "storage",
        "what can be done here",
    ]
    assert "  train on processors (cluster=local_cpu)" in out and "no: no GPU that torch can use" in out
    assert err.count("looking at ") == 4 and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("torch_answers")
def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", str(tmp_path), "--storage-mib", "0", "--json"])
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["fit"] is True and set(facts) == {"fit", "findings", "works"}
    assert all(set(each) == {"topic", "name", "state", "found", "hint"} for each in facts["findings"])
    assert {each["name"]: each["can"] for each in facts["works"]}["train on GPUs (cluster.device=cuda)"] is False


def test_a_torch_that_does_not_import_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "ask_torch", lambda: "ImportError: libcudnn.so.9")
    assert main(["doctor", str(tmp_path), "--storage-mib", "0"]) == 93
    out = capsys.readouterr().out
    assert "broken: ImportError: libcudnn.so.9" in out and "no: torch: ImportError: libcudnn.so.9" in out


@pytest.mark.parametrize("words", [["nowhere"], [".", "--storage-mib", "-1"], [".", "--storage-mib", "much"]])
def test_mistakes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 93
    assert "Try: " in capsys.readouterr().err

"""The process that imports torch: what it says, and what is said of it where it fails, hangs or dies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from efflaunch.launcher.doctor.torch_probe import ask_torch, probe


def test_what_torch_says() -> None:
    facts = probe()
    assert facts["version"] == torch.__version__ and facts["cuda"] == torch.version.cuda
    assert "gloo" in facts["backends"] and facts["problem"] == "" and len(facts["gpus"]) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'Traceback' >&2; echo 'ImportError: libcudnn.so.9 is missing' >&2; exit 1", "ImportError: libcudnn.so.9 is missing"),
        ("exit 139", "its import ended with exit code 139"),
        ("exec sleep 60", "importing torch and asking for GPUs took more than 1 s"),
    ],
)
def test_a_torch_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert ask_torch(limit_s=1.0 if "sleep" in script else 60.0) == words

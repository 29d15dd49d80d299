"""The compiler that is taken: the first of the names that is on PATH."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.utils.compilers import compiler_path


def test_the_first_name_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_path() is None
    for name in ("clang++", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert compiler_path() == str(tmp_path / "g++")
    assert compiler_path(["clang++", "g++"]) == str(tmp_path / "clang++")

"""Collects what goes along with a job: run.yaml and the user's own files, and nothing by accident."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import ConfigError
from ...units import format_bytes
from ...utils.names import check_text
from ..rundir.run_dir import HASH_FILE, RUN_FILE

_LEFT_OUT = ("__pycache__",)
_NUM_NAMED = 5


def measure(code: Sequence[str], max_bytes: int) -> dict[str, int]:
    """Bytes of every top-level entry that would be sent; ConfigError where one is not there or all are too much.

    Ray's own limit shows only after the upload, and names nobody; .git is the usual culprit.
    """
    sizes: dict[str, int] = {}
    for index, name in enumerate(code):
        path = Path(name)
        if not path.exists():
            hint = "launcher.ray.code=[my_package,my_file.py]"
            raise ConfigError(f"launcher.ray.code[{index}]", found=f"no {name} in {Path.cwd()}", expected="a file or folder", hint=hint)
        check_text(f"launcher.ray.code[{index}]", path.resolve().name)
        if path.resolve().name in sizes:
            raise ConfigError(f"launcher.ray.code[{index}]", found=f"a second {path.name}", expected="names that differ", hint="rename one")
        sizes[path.resolve().name] = sum(size for _, size in _files(path))
    total = sum(sizes.values())
    if total > max_bytes:
        raise _too_much(code, total, max_bytes)
    return sizes


def _files(path: Path) -> Iterator[tuple[Path, int]]:
    if path.is_file():
        yield path, path.stat().st_size
        return
    for folder, names, files in os.walk(path):
        names[:] = [name for name in names if name not in _LEFT_OUT]
        yield from ((Path(folder) / file, (Path(folder) / file).lstat().st_size) for file in files)


def _too_much(code: Sequence[str], total: int, max_bytes: int) -> ConfigError:
    parts: dict[Path, int] = {}
    for name in code:
        for file, size in _files(Path(name)):
            inside = file.relative_to(Path(name)).parts
            # One level down: `mine/.git`, and not each of its thousand files.
            key = Path(name, *inside[:1])
            parts[key] = parts.get(key, 0) + size
    worst = sorted(parts.items(), key=lambda item: -item[1])[:_NUM_NAMED]
    named = ", ".join(f"{path} {format_bytes(size)}" for path, size in worst)
    return ConfigError(
        "launcher.ray.code",
        found=f"{format_bytes(total)}: {named}",
        expected=f"at most launcher.ray.max_upload_bytes={format_bytes(max_bytes)}",
        hint="name only what the ranks import; keep data on shared storage",
    )


def stage(run_dir: Path, code: Sequence[str], target: Path) -> None:
    """Fill `target`, anew, with run.yaml, its hash and a copy of `code`."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in (RUN_FILE, HASH_FILE):
        shutil.copy2(run_dir / name, target / name)
    for name in code:
        path = Path(name)
        if path.is_file():
            shutil.copy2(path, target / path.resolve().name)
        else:
            shutil.copytree(path, target / path.resolve().name, ignore=shutil.ignore_patterns(*_LEFT_OUT, ".gitignore"))

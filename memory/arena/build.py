"""The arena's C++ made on demand, once per source and torch, and kept in the user's cache directory."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import ConfigError
from ...utils.compilers import COMPILERS, PACKAGE, compiler_path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a library is made of; everything here is part of its name in the cache."""

    source: str
    """A file of this folder."""
    flags: tuple[str, ...]
    headers: tuple[str, ...] = ("guard.h", "exports.h")
    torch_version: str = field(default_factory=lambda: str(torch.__version__))

    def digest(self) -> str:
        text = [(HERE / name).read_text(encoding="utf-8") for name in (self.source, *self.headers)]
        parts = [*text, *self.flags, self.torch_version, platform.machine()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cpu_recipe() -> Recipe:
    return Recipe("cpu.cpp", _common())


def cuda_recipe(include: Path, runtime: Path) -> Recipe:
    """Against the CUDA runtime: host code only, so no nvcc. `runtime`: the file libcudart.so*."""
    return Recipe("cuda.cpp", (*_common(), f"-I{include}", f"-L{runtime.parent}", f"-l:{runtime.name}", f"-Wl,-rpath,{runtime.parent}"))


def _common() -> tuple[str, ...]:
    """Flags of any library that uses c10, torch's core."""
    root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = "-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", abi
    return *flags, f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", f"-Wl,-rpath,{root / 'lib'}"


def default_cache() -> Path:
    return Path.home() / ".cache" / "efflaunch" / "arena"


def build(recipe: Recipe, cache: Path, *, compilers: Sequence[str] = COMPILERS) -> Path:
    """The library's file; processes that ask at the same time wait for the one that compiles.

    ConfigError where there is no compiler, or it cannot make the library, or nothing can be written to the cache.
    """
    library = cache / f"{Path(recipe.source).stem}-{recipe.digest()}.so"
    if library.is_file():
        return library
    compiler = find_compiler(compilers)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _compile(compiler, recipe, library)
    except OSError as error:
        raise _failed(f"nothing can be written to {cache} ({error.strerror or error})", "room for a library of 100 KB there") from error
    return library


def find_compiler(compilers: Iterable[str] = COMPILERS) -> str:
    """ConfigError naming the package to install where there is none."""
    names = tuple(compilers)
    compiler = compiler_path(names)
    if compiler is None:
        raise _failed(f"no C++ compiler (looked for {', '.join(names)})", "one, to build the arena's allocator on first use", PACKAGE)
    return compiler


def _compile(compiler: str, recipe: Recipe, library: Path) -> None:
    """Into a temporary file that is then renamed: whoever finds the library finds all of it."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        command = [compiler, str(HERE / recipe.source), "-o", temporary, *recipe.flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = " | ".join(line for line in done.stderr.splitlines() if "error" in line)[:400] or f"exit code {done.returncode}"
            raise _failed(f"{compiler} fails on {recipe.source}: {said}", "a compiler with C++20 (g++ 11 or newer)", PACKAGE)
        os.chmod(temporary, 0o755)
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _failed(found: str, expected: str, install: str | None = None) -> ConfigError:
    hint = f"install {install}, or memory.arena=default" if install else "memory.arena=default"
    return ConfigError("memory.arena=planned", found=found, expected=expected, hint=hint)
